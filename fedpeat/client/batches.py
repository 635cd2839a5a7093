"""The order in which a client reads its rows: an endless stream that rounds continue."""

from collections.abc import Iterator

import torch

from fedpeat.core import DataError, seed_for


def batch_indices(
    rows: int, *, batch_size: int, start: int, count: int, seed: int, client: str
) -> Iterator[torch.Tensor]:
    """Yield the row numbers of `count` batches, each `(batch_size,)`, from the client's endless stream of rows.

    The stream is one random permutation of all rows after the other (epochs), each from its own seed. It is entered
    anywhere without reading what is before, so the rounds of a run, or a loop that never heard of rounds, see the same
    batches. A batch may lie across epochs; with fewer rows than `batch_size` it repeats some.

    Args:
        rows: How many rows the client has.
        batch_size: Rows a batch.
        start: Batches of the stream to pass over.
        count: Batches to yield.
        seed: The run's seed.
        client: The client's name, so that no two clients share an order.

    Raises:
        DataError: If there are no rows.

    >>> first, second = batch_indices(3, batch_size=3, start=0, count=2, seed=1, client="a")
    >>> sorted(first.tolist()), sorted(second.tolist())
    ([0, 1, 2], [0, 1, 2])
    >>> [resumed] = batch_indices(3, batch_size=3, start=1, count=1, seed=1, client="a")
    >>> bool((resumed == second).all())
    True
    """
    if rows < 1:
        raise DataError(
            f"client {client!r} cannot train", "it has no training rows", "leave it out: data.too_small=drop"
        )
    epoch, offset = divmod(start * batch_size, rows)
    order = _permutation(rows, seed, client, epoch)
    for _ in range(count):
        parts, missing = [], batch_size
        while missing > 0:
            part = order[offset : offset + missing]
            parts.append(part)
            missing -= len(part)
            offset += len(part)
            if offset == rows:
                epoch, offset = epoch + 1, 0
                order = _permutation(rows, seed, client, epoch)
        yield torch.cat(parts) if len(parts) > 1 else parts[0]


def _permutation(rows: int, seed: int, client: str, epoch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed_for(seed, "order", client, epoch))
    return torch.randperm(rows, generator=generator)
