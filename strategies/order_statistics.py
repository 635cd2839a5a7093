"""Rules that take each coordinate of the travelling tensors by itself, and look at the order of the clients' values."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from fedpeat.core import ClientUpdate, EngineError
from strategies.recipe import Facts, Recipe, in_range
from strategies.reducers import Situation, Step, gathering

_AT_ONCE = 1 << 18

Rule = Callable[[np.ndarray], np.ndarray]
"""From the clients' values, fp32, `(coordinates, clients)`, rising along each row, to one value a row, fp32 or fp64."""


def by_coordinate(updates: Sequence[ClientUpdate], rule: Rule) -> dict[str, torch.Tensor]:
    """Return what `rule` makes of the clients' deltas, fp32, coordinate by coordinate.

    The order of the clients plays no part, to the bit. A name that only some updates hold is zeros in the others.

    Args:
        updates: At least one.
        rule: Sees some 2^18 values at a time.
    """
    shapes = {name: delta.shape for update in updates for name, delta in update.delta.items()}
    return {name: _one(shape, [update.delta.get(name) for update in updates], rule) for name, shape in shapes.items()}


def _one(shape: torch.Size, deltas: Sequence[torch.Tensor | None], rule: Rule) -> torch.Tensor:
    result = torch.empty(shape)
    flat = result.view(-1)
    rows = [torch.zeros(1).expand(flat.numel()) if delta is None else delta.float().reshape(-1) for delta in deltas]
    step = max(1, _AT_ONCE // len(rows))
    for start in range(0, flat.numel(), step):
        columns = np.stack([row[start : start + step].numpy() for row in rows], axis=1)
        columns.sort(axis=1)
        flat[start : start + step] = torch.from_numpy(rule(columns))
    return result


def middle(columns: np.ndarray) -> np.ndarray:
    """Return the median of each row: the value in the middle, or the mean of the two that are, fp64.

    >>> middle(np.array([[1.0, 2.0, 9.0], [0.0, 0.0, 3.0]]))
    array([2., 0.])
    """
    count = columns.shape[1]
    return columns[:, (count - 1) // 2 : count // 2 + 1].mean(axis=1, dtype=np.float64)


def central(keep: int) -> Rule:
    """Return the rule that takes the mean, fp64, of the `keep` values closest to the median; of equals, the lower.

    >>> central(2)(np.array([[1.0, 2.0, 4.0, 90.0]]))
    array([3.])
    """

    def rule(columns: np.ndarray) -> np.ndarray:
        away = np.abs(columns - middle(columns)[:, None])
        closest = np.argsort(away, axis=1, kind="stable")[:, :keep]
        return np.take_along_axis(columns, closest, axis=1).mean(axis=1, dtype=np.float64)

    return rule


def coordinate_median() -> Recipe:
    """Return the coordinate-wise median of the deltas: of an even number, the mean of the two in the middle.

    Weights play no part: clients report their own, and a median is to stand whatever a client reports.

    Source: Yin et al. 2018, arXiv 1803.01498, definition 1 and algorithm 1, option I.
    Departures: of the clients' changes over a round of local training, not of gradients. On LoRA it acts on the factors
        A and B, so that the step's product is nobody's.
    """
    facts = Facts(
        "robust",
        "Yin et al. 2018, arXiv 1803.01498",
        "robust",
        note="Acts on LoRA's factors, unweighted; withstands any values from fewer than half of a round's clients.",
    )
    reduce = gathering(lambda _, updates: Step(by_coordinate(updates, middle)))
    return Recipe("coordinate_median", reduce, weight_by="equal", facts=facts)


def trimmed_mean(*, share: float = 0.2) -> Recipe:
    """Return the coordinate-wise mean of the deltas without the largest and the smallest.

    Of the `n` clients' values of a coordinate, `share * n` (rounded down) are dropped at each end; the rest count
    alike. Weights play no part: clients report their own.

    Args:
        share: beta, of the clients, at each end; 0 is the plain unweighted mean.

    Raises:
        ConfigError: If it is negative or leaves nothing.

    Source: Yin et al. 2018, arXiv 1803.01498, definition 2 and algorithm 1, option II.
    Departures: as in `coordinate_median`. A round with so few clients that none would be dropped, though `share` is not
        0, is an error rather than a mean.
    """
    in_range("trimmed_mean", "share", share, 0, 0.49)

    def finish(_: Situation, updates: tuple[ClientUpdate, ...]) -> Step:
        count = len(updates)
        drop = dropped(share, count)
        if share > 0 and drop == 0:
            raise EngineError(
                f"strategy=trimmed_mean with share={share} needs {enough_to_drop(share)} updates a round",
                f"{count} came, of which {share} at each end is less than one",
                "let more clients take part (clients.per_round, server.train), or raise strategy.share",
            )
        return Step(by_coordinate(updates, lambda columns: columns[:, drop : count - drop].mean(1, dtype=np.float64)))

    facts = Facts(
        "robust",
        "Yin et al. 2018, arXiv 1803.01498",
        "robust",
        note="Acts on LoRA's factors, unweighted; withstands any values from up to `share` of a round's clients.",
    )
    return Recipe("trimmed_mean", gathering(finish), weight_by="equal", facts=facts)


def dropped(share: float, count: int) -> int:
    """Return `share * count` rounded down, whatever the last bits of `share` are.

    >>> dropped(0.29, 100), dropped(0.2, 9)
    (29, 1)
    """
    return int(share * count + 1e-9)


def enough_to_drop(share: float) -> int:
    """Return the fewest clients of which `share` is at least one.

    >>> enough_to_drop(0.2), enough_to_drop(0.3)
    (5, 4)
    """
    return next(count for count in range(1, int(1 / share) + 3) if dropped(share, count))
