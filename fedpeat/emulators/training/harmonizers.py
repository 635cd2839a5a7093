"""A builder that puts low-rank affine maps in the place of dropped blocks."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fedpeat.core import ConfigError, ModelError, Tensors, shorten
from fedpeat.emulators.blocks import Block, Blocks, BuildContext, Builder
from fedpeat.emulators.harmonizer import harmonize
from fedpeat.emulators.training.hidden import Tap, hidden_states, in_batches, without_labels
from fedpeat.emulators.training.regression import Fit, Moments, reduced_rank
from fedpeat.models import find_blocks


@dataclass(frozen=True)
class Run:
    """Dropped blocks in a row, and the door where a harmonizer stands in for them.

    Attributes:
        first: Index of the first of them in the full model.
        last: Of the last.
        host: Place of the kept block that the harmonizer is attached to.
        door: `before` or `after` that block.
    """

    first: int
    last: int
    host: int
    door: str


def harmonizers(*, rank: int = 16, rows: int = 64, damping: float = 1e-3) -> Builder:
    """Let an affine map of low rank stand in for each row of dropped blocks; it comes after a selection in a chain.

    Between two blocks that stay, the dropped ones took the hidden state h to h + f(h). The harmonizer is
    `h + U (V h) + c`, with V `(rank, width)`, U `(width, rank)` and c `(width,)` by reduced-rank ridge regression of
    f(h) on h, over the tokens of public text, in the full model. It is a part of the next kept block, at its input; of
    the kept block before, at its output, where an adapter block or the end comes first. So it is no block of its own,
    with no slot in a key-value cache.

    Args:
        rank: Of the map; at most the model's width.
        rows: How many rows of public text, at even distances; all if there are fewer.
        damping: Ridge, relative to the mean variance of a hidden unit; 0 for none.

    Raises:
        ConfigError: If a setting is out of range; or, when the builder is applied, if there is no public text, blocks
            are shared or have harmonizers already, or dropped blocks have no kept one beside them.
        ModelError: If the model's blocks do not take and give the hidden state as transformers' do, or it is not
            finite.

    Source: K. Yao, Z. Tan, T. Ye et al., ScaleOT: Privacy-utility-scalable Offsite-tuning with Dynamic LayerReplace
    and Selective Rank Compression, 2024, arXiv:2412.09812 (harmonizers). Regression: A. J. Izenman, Reduced-rank
    regression for the multivariate linear model, 1975.

    Departures: in closed form, instead of by gradient descent with the block choice by reinforcement learning; linear,
    without an activation between the factors; every row of dropped blocks gets one, each fitted to the full model's
    own hidden states, not to what earlier harmonizers give. Train them further with `distilled`.
    """
    if rank < 1:
        raise ConfigError(f"cannot use harmonizers of rank={rank}", "it counts directions", "set rank >= 1")
    if rows < 1:
        raise ConfigError(f"cannot fit harmonizers on rows={rows}", "it counts rows of text", "set rows >= 1")
    if not (math.isfinite(damping) and damping >= 0):
        raise ConfigError(f"cannot use damping={damping}", "it is a share of a variance", "set damping >= 0")

    def build(blocks: Blocks) -> Blocks:
        context, text = blocks.needed_context("harmonizers"), blocks.needed_rows("harmonizers")
        runs = find_runs(blocks, context)
        if not runs:
            return blocks
        moments = _moments(context, runs, _evenly(text, rows))
        fits = {run: _fit(run, moment, rank=rank, damping=damping) for run, moment in zip(runs, moments, strict=True)}
        notes = [_note(run, fit) for run, fit in fits.items()]
        return blocks.having(
            tuple(_harmonized(block, fits, context.model.dtype) for block in blocks.blocks),
            {"builder": "harmonizers", "what": "regression", "runs": notes},
        )

    return Builder("harmonizers", {"rank": rank, "rows": rows, "damping": damping}, build)


def find_runs(blocks: Blocks, context: BuildContext) -> tuple[Run, ...]:
    """Return the runs of dropped blocks, in order, each with the door where its harmonizer goes.

    Raises:
        ConfigError: If blocks are shared or harmonized, or a run has no kept block beside it.
    """
    split, kept = context.split, {block.place for block in blocks.blocks}
    if len({id(block.module) for block in blocks.blocks}) < len(blocks) or any(block.shared for block in blocks.blocks):
        raise ConfigError(
            "cannot use emulator stage harmonizers", "a block stands at several places", "leave the sharing stage out"
        )
    if any(change["kind"] == "harmonizers" for block in blocks.blocks for change in block.changes):
        raise ConfigError("cannot use emulator stage harmonizers", "the blocks have some already", "use it once")
    there = sorted({*split.adapter, *kept})
    runs = []
    for left, right in zip([-1, *there], [*there, split.count], strict=True):
        if right - left == 1:
            continue
        if right in kept:
            runs.append(Run(left + 1, right - 1, right, "before"))
        elif left in kept:
            runs.append(Run(left + 1, right - 1, left, "after"))
        else:
            raise ConfigError(
                f"cannot put a harmonizer in the place of blocks {shorten(range(left + 1, right), 24)}",
                "no block of the emulator stands beside them",
                "keep one of them: raise the selection's kept_blocks, or move the adapter's blocks to the ends",
            )
    return tuple(runs)


def _evenly(text: Tensors, rows: int) -> dict[str, torch.Tensor]:
    count = len(text["input_ids"])
    chosen = torch.tensor([index * count // rows for index in range(rows)] if count > rows else range(count))
    return {name: tensor[chosen] for name, tensor in without_labels(text).items()}


@torch.no_grad()
def _moments(context: BuildContext, runs: Sequence[Run], text: Tensors) -> list[Moments]:
    model, stack = context.model, find_blocks(context.model)
    if stack.beside and any(run.door == "after" for run in runs):
        raise ModelError(
            "cannot put a harmonizer behind a block",
            f"this {type(model).__name__} keeps parts of its blocks at {shorten(stack.beside)}",
            "keep the last block of the middle, so that all harmonizers stand before one",
        )
    taps = [
        (Tap(run.first), Tap(run.last, behind=True) if run.last + 1 == stack.count else Tap(run.last + 1))
        for run in runs
    ]
    found: list[Moments] = []
    for number, batch in enumerate(in_batches(text, context.batch_size, model.device)):
        context.tell("fitting harmonizers", number * context.batch_size / len(text["input_ids"]))
        states, _ = hidden_states(model, stack.path, [tap for pair in taps for tap in pair], batch)
        real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"]) > 0
        if not found:
            found = [Moments(states[0].shape[-1], model.device) for _ in runs]
        for moments, start, end in zip(found, states[::2], states[1::2], strict=True):
            inputs = start[real].double()
            moments.add(inputs, end[real].double() - inputs)
    return found


def _fit(run: Run, moments: Moments, *, rank: int, damping: float) -> Fit:
    asked = f"cannot fit a harmonizer for blocks {shorten(range(run.first, run.last + 1), 24)}"
    if not moments.count:
        raise ConfigError(asked, "the public text has no tokens but padding", "give the server other text")
    sums = (moments.squares, moments.products, moments.energy)
    if not all(bool(tensor.isfinite().all()) for tensor in sums):
        raise ModelError(asked, "the full model's hidden states are not finite", "load it in float32 or bfloat16")
    return reduced_rank(moments, rank=min(rank, len(moments.squares)), damping=damping)


def _note(run: Run, fit: Fit) -> dict[str, Any]:
    return {"blocks": [run.first, run.last], "host": run.host, "door": run.door, "explained": fit.explained}


def _harmonized(block: Block, fits: Mapping[Run, Fit], dtype: torch.dtype) -> Block:
    own = {run.door: fit for run, fit in fits.items() if run.host == block.place}
    if not own:
        return block
    change = {"kind": "harmonizers"} | {
        door: len(own[door].down) if door in own else None for door in ("before", "after")
    }
    change["width"] = len(next(iter(own.values())).bias)
    module = copy_sharing(block.module)
    try:
        harmonize(module, change)
    except ValueError as error:
        raise ModelError(
            f"cannot attach a harmonizer to block {block.source}", str(error), "use distilled alone"
        ) from error
    for door, fit in own.items():
        _fill(module.get_submodule(door), fit, dtype)
    return replace(block, module=module, changes=(*block.changes, change))


def _fill(harmonizer: nn.Module, fit: Fit, dtype: torch.dtype) -> None:
    values = {"down.weight": fit.down, "up.weight": fit.up, "up.bias": fit.bias}
    for name, value in values.items():
        path, _, leaf = name.partition(".")
        own = nn.Parameter(value.to(dtype).contiguous(), requires_grad=False)
        setattr(harmonizer.get_submodule(path), leaf, own)


def copy_sharing(module: nn.Module, values: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
    """Return a copy of a module that shares its tensors, but for the parameters in `values`, which are taken instead.

    Args:
        module: Left alone.
        values: New parameters by name; one that is tied within the module is new under all its names.

    >>> layer = nn.Linear(2, 2)
    >>> other = copy_sharing(layer, {"bias": torch.zeros(2)})
    >>> other.weight is layer.weight, other.bias is layer.bias
    (True, False)
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    for name, value in (values or {}).items():
        memo[id(module.get_parameter(name))] = nn.Parameter(value, requires_grad=False)
    return copy.deepcopy(module, memo)
