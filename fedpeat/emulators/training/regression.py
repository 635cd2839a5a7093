"""Reduced-rank ridge regression from second moments."""

from typing import NamedTuple

import torch


class Fit(NamedTuple):
    """An affine map of low rank: `x -> up @ (down @ x) + bias`.

    Attributes:
        down: `(rank, width)`, fp64.
        up: `(width, rank)`, fp64.
        bias: `(width,)`, fp64.
        explained: The share of the targets' variance that the map explains; 1.0 if they do not vary.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor
    explained: float


class Moments:
    """Sums over tokens, in fp64, of which a linear regression is made; no token is kept.

    Args:
        width: Of inputs and targets.
        device: Where the sums are.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        fresh = {"dtype": torch.float64, "device": device}
        self.count = 0
        self.inputs, self.targets = torch.zeros(width, **fresh), torch.zeros(width, **fresh)
        self.squares, self.products = torch.zeros(width, width, **fresh), torch.zeros(width, width, **fresh)
        self.energy = torch.zeros(width, **fresh)

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Add tokens: inputs and targets `(tokens, width)`."""
        inputs, targets = inputs.double(), targets.double()
        self.count += len(inputs)
        self.inputs += inputs.sum(0)
        self.targets += targets.sum(0)
        self.squares += inputs.T @ inputs
        self.products += inputs.T @ targets
        self.energy += targets.square().sum(0)


def reduced_rank(moments: Moments, *, rank: int, damping: float) -> Fit:
    """Return the affine map of at most `rank` with the least squared error plus `ridge * |map|**2`.

    `ridge` is `damping` times the mean diagonal of the centred inputs' second moments; the bias is not penalised. The
    full-rank solution is `W = (H'H + ridge)^-1 H'R` of centred inputs H and targets R, `(tokens, width)`; it is
    projected on the leading right singular directions of its fitted values, those of the ridge's rows among them.

    Args:
        moments: Of at least one token.
        rank: Largest rank; the width at most.
        damping: 0 or more. At 0, directions in which the inputs do not vary get no weight.

    Source: A. J. Izenman, Reduced-rank regression for the multivariate linear model, 1975, Journal of Multivariate
    Analysis 5(2); A. Mukherjee, J. Zhu, Reduced rank ridge regression and its kernel extensions, 2011, Statistical
    Analysis and Data Mining 4(6), section 2.
    """
    count = moments.count
    centre, target = moments.inputs / count, moments.targets / count
    squares = moments.squares - count * torch.outer(centre, centre)
    products = moments.products - count * torch.outer(centre, target)
    energy = float((moments.energy - count * target.square()).sum())
    ridged = squares + damping * squares.diagonal().mean() * torch.eye(len(squares), dtype=squares.dtype).to(squares)
    whole = _inverse(ridged, scale=moments.squares) @ products
    fitted = whole.T @ ridged @ whole
    leading = torch.linalg.eigh((fitted + fitted.T) / 2)[1].flip(-1)[:, :rank]
    leading = leading * torch.where(leading.gather(0, leading.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    down, up = (whole @ leading).T, leading
    kept = down.T @ up.T
    error = energy - 2 * float((kept * products).sum()) + float((kept * (squares @ kept)).sum())
    explained = 1.0 - error / energy if energy > 0 else 1.0
    # Both factors of one size, so that a 16-bit type or a quantiser finds neither too small.
    even = down.norm(dim=1).sqrt()
    even = torch.where(even > 0, even, 1.0)
    return Fit(down / even[:, None], up * even, target - centre @ kept, explained)


def _inverse(matrix: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
    """Return the pseudo-inverse; what is rounding of the sums `scale`, from which `matrix` came, counts as zero."""
    values, vectors = torch.linalg.eigh(matrix)
    least = len(values) * torch.finfo(values.dtype).eps * scale.diagonal().sum()
    return (vectors * torch.where(values > least, 1 / values, 0.0)) @ vectors.T
