"""Which documents are for training, validation, test, and the server? No document is for two."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedpeat.core import DataError, seed_for
from fedpeat.data.spec import DataSpec


@dataclass(frozen=True)
class ServerDocuments:
    """What the server takes before clients get theirs: indices of documents, ascending.

    Attributes:
        train: For the server's own tuning.
        public: That all may see.
        test: Held-out documents of the server's own source; those of clients come on top.
        rest: What is left for clients.
    """

    train: np.ndarray
    public: np.ndarray
    test: np.ndarray
    rest: np.ndarray


def take_server_documents(
    spec: DataSpec, *, own: np.ndarray, clients: np.ndarray, held_out: np.ndarray, seed: int
) -> ServerDocuments:
    """Take the server's shares from its own source if it has one, else from that of the clients.

    Args:
        spec: The shares.
        own: Indices of the documents of the server's own source; what its shares leave is for test.
        clients: Indices of the clients' documents.
        held_out: `(documents,)`, whether a source has set a document aside for test; the shares leave these alone.
        seed: The run's seed.

    Raises:
        DataError: If a share comes to no document.
    """
    pool = own if len(own) else clients[~held_out[clients]]
    order = np.random.default_rng(seed_for(seed, "server documents")).permutation(pool)
    train, public = _count(spec.server_share, pool, "server_share"), _count(spec.public_share, pool, "public_share")
    taken = order[: train + public]
    test = np.setdiff1d(own, taken)
    rest = np.setdiff1d(clients, taken)
    return ServerDocuments(np.sort(taken[:train]), np.sort(taken[train:]), test, rest)


def _count(share: float, pool: np.ndarray, key: str) -> int:
    count = round(share * len(pool))
    if share and not count:
        remedy = f"raise data.{key}, or give more data"
        raise DataError(f"data.{key}={share:g} is no document", f"there are {len(pool)} to take it from", remedy)
    return count


def hold_out(
    documents: np.ndarray, spec: DataSpec, *, held_out: np.ndarray, client: str, seed: int
) -> dict[str, np.ndarray]:
    """Split one client's documents into `train`, `validation` and `test`, each ascending.

    A share of a few documents is rounded up or down by chance, so that over many small clients the share is met. At
    least one document stays for training, save where the source itself has set all aside.

    Args:
        documents: Indices of the client's documents.
        spec: The shares.
        held_out: `(documents,)`, whether a source has set a document aside for test.
        client: Its name, which chance follows.
        seed: The run's seed.
    """
    aside, free = documents[held_out[documents]], documents[~held_out[documents]]
    chance = np.random.default_rng(seed_for(seed, "held-out documents", client))
    order = chance.permutation(free)
    test = min(int(spec.test_share * len(free) + chance.random()), max(len(free) - 1, 0))
    validation = min(int(spec.validation_share * len(free) + chance.random()), max(len(free) - 1 - test, 0))
    return {
        "train": np.sort(order[test + validation :]),
        "validation": np.sort(order[test : test + validation]),
        "test": np.sort(np.concatenate([aside, order[:test]])),
    }
