"""One seed for a run, and from it one for every use, independent of order and of engine."""

import hashlib


def seed_for(run_seed: int, purpose: str, *parts: object) -> int:
    """Derive a seed from the run's seed, a purpose and any parts (round, client name, ...).

    A hash, not arithmetic: neighbouring runs, rounds or clients share nothing. The result fits torch and numpy
    generators (63 bits).

    >>> seed_for(1, "batches", 3, "sympy") == seed_for(1, "batches", 3, "sympy")
    True
    >>> seed_for(1, "batches", 3, "sympy") == seed_for(1, "batches", 4, "sympy")
    False
    """
    text = "\x1f".join([str(run_seed), purpose, *(str(part) for part in parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
