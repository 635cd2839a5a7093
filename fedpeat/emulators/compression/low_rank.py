"""Linear layers as products of two narrow ones."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from fedpeat.core import ConfigError, nearest
from fedpeat.emulators.assemble import stand_in
from fedpeat.emulators.blocks import Block, Blocks, Builder
from fedpeat.emulators.compression.calibration import damped_root, input_moments
from fedpeat.emulators.compression.layers import Linear, matrix_of, shape_of
from fedpeat.emulators.compression.shrink import (
    Encode,
    Encoded,
    Layers,
    check_count,
    check_share,
    compress,
    each_layer,
)
from fedpeat.emulators.selection.activations import batches, public_rows
from fedpeat.models import linear_layers
from fedpeat.models import sublayers as kinds_of

_SUBLAYERS = ("attention", "mlp")


def low_rank(
    *, share: float = 0.5, sublayers: Sequence[str] | None = None, calibrated: bool = False, rows: int = 64
) -> Builder:
    """Replace each linear layer by the best product of two narrow ones, `W ~ up @ down`.

    Of a matrix `(out, in)` with the singular value decomposition `U diag(s) V'`, the r largest singular values stay:
    `up = U_r diag(sqrt(s_r))` is `(out, r)` and `down = diag(sqrt(s_r)) V_r'` is `(r, in)`, with
    `r = max(1, floor(share * out * in / (out + in)))`. The error `|W - up @ down|` in the Frobenius norm is the root of
    the sum of squares of the singular values left out, the least there is at rank r. A layer that would not become
    smaller, `r * (out + in) >= out * in`, stays as it is. Biases stay.

    Args:
        share: Parameters that are kept of each matrix, above 0 and at most 1.
        sublayers: Where: a list of `attention` and `mlp`; None for both.
        calibrated: Make `|(W - up @ down) x|` small for the inputs x that the layer gets on public text, instead of the
            error of the weights. It takes a forward pass over that text for each block.
        rows: Public rows that are used for that, at even distances.

    Raises:
        ConfigError: If an argument is out of range, or (when it is applied) there are no linear layers, or no public
            text to calibrate on.

    Source: C. Eckart, G. Young, The approximation of one matrix by another of lower rank, 1936; the calibration after
    X. Wang et al., SVD-LLM, 2024, arXiv:2403.07378 (truncation-aware data whitening).

    Departures: With `S = sum x x'` over the tokens, the calibrated product is the truncated decomposition of `W L`
    times `L^-1`, where `L L' = S + 0.01 mean(diag(S)) I`; the damping is ours. The inputs are those in the emulated
    model as it was before this builder, after others in a chain.
    """
    check_share(share, builder="low_rank")
    check_count(rows, builder="low_rank", key="rows")
    _check_sublayers(sublayers)
    layers = _layers_in(sublayers or _SUBLAYERS)

    def build(blocks: Blocks) -> Blocks:
        plain = each_layer(partial(_encode, share=share), layers)
        encode = _calibrated(blocks, layers, share, rows) if calibrated else plain
        return compress(blocks, builder="low_rank", kind="low_rank", encode=encode, layers=layers)

    settings = {"share": share, "sublayers": None if sublayers is None else list(sublayers), "calibrated": calibrated}
    return Builder("low_rank", {**settings, "rows": rows} if calibrated else settings, build)


def rank_for(share: float, outputs: int, inputs: int) -> int | None:
    """Return the rank at which a share of a matrix's parameters is kept; None if that makes it no smaller.

    >>> rank_for(0.5, 32, 48), rank_for(0.001, 32, 48), rank_for(1.0, 32, 32)
    (9, 1, None)
    """
    rank = max(1, int(share * outputs * inputs / (outputs + inputs)))
    return rank if rank * (outputs + inputs) < outputs * inputs else None


def factors(matrix: torch.Tensor, rank: int, moments: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `up` `(out, rank)` and `down` `(rank, in)`, whose product comes closest to `matrix`.

    Args:
        matrix: `(out, in)`.
        rank: At most the smaller of the two.
        moments: `sum x x'`, `(in, in)`: then the product comes closest (but for the damping) on these inputs.
    """
    root = None if moments is None else damped_root(moments)
    weighted = matrix.float() if root is None else matrix.double() @ root
    left, values, right = torch.linalg.svd(weighted, full_matrices=False)
    halves = values[:rank].sqrt()
    up, down = left[:, :rank] * halves, halves[:, None] * right[:rank]
    if root is not None:
        down = torch.linalg.solve_triangular(root, down, upper=False, left=False)
    return up, down


def _encode(layer: Linear, share: float, moments: torch.Tensor | None = None) -> Encoded | None:
    rank = rank_for(share, *shape_of(layer))
    if rank is None:
        return None
    up, down = factors(matrix_of(layer), rank, moments)
    return Encoded({"rank": rank}, {"up.weight": up, "down.weight": down})


def _calibrated(blocks: Blocks, layers: Layers, share: float, rows: int) -> Encode:
    context = blocks.needed_context("low_rank")
    text = public_rows(blocks, "low_rank", rows)
    view = stand_in(context.model, context.split, blocks)
    places = [position for position in range(len(view.sources)) if position not in view.adapter_positions]

    def encode(block: Block) -> dict[str, Encoded]:
        pairs = zip(places, blocks.blocks, strict=True)
        positions = [position for position, other in pairs if other.module is block.module]
        own = layers(block.module)
        moments = input_moments(view, positions, own, batches(context, text))
        new = {path: _encode(layer, share, moments.get(path)) for path, layer in own.items()}
        return {path: one for path, one in new.items() if one is not None}

    return encode


def _layers_in(wanted: Sequence[str]) -> Layers:
    def layers(module: nn.Module) -> Mapping[str, Linear]:
        kinds = kinds_of(module)
        return {path: layer for path, layer in linear_layers(module).items() if kinds[f"{path}.weight"] in wanted}

    return layers


def _check_sublayers(wanted: Sequence[str] | None) -> None:
    if wanted is None:
        return
    if isinstance(wanted, str) or not wanted:
        found = "it is a list of attention and mlp, or null for both"
        raise ConfigError(f"emulator=low_rank with sublayers={wanted!r}", found, "set emulator.sublayers=[mlp]")
    for name in wanted:
        if name not in _SUBLAYERS:
            asked = f"emulator=low_rank with sublayers={list(wanted)}"
            raise ConfigError(asked, f"{name!r} has no linear layers of its own", nearest(str(name), _SUBLAYERS))
