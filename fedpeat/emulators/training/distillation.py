"""A builder that trains the kept blocks to do the whole middle's work."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedpeat.core import ConfigError, Tensors, digest, nearest
from fedpeat.emulators.assemble import EmulatedModel, stand_in
from fedpeat.emulators.blocks import Block, Blocks, BuildContext, Builder
from fedpeat.emulators.cache import cache_folder, cache_key
from fedpeat.emulators.training.harmonizers import copy_sharing
from fedpeat.emulators.training.hidden import in_batches
from fedpeat.emulators.training.loop import (
    Pace,
    batch_indices,
    check_finite,
    clear_checkpoints,
    descend,
    read_kept,
    write_kept,
)
from fedpeat.emulators.training.objective import Objective, Weights, measure, with_labels
from fedpeat.emulators.training.student import PARTS, make_trainable, name_of, trainable
from fedpeat.models import find_blocks, model_tensors

REMEMBERED_BYTES = 512 * 2**20
"""Up to this size, the full model's hidden states on all rows are kept in memory: it then runs once on each row."""

_HELD_OUT = 10
_POINTS = 50


def distilled(
    *,
    steps: int = 300,
    learning_rate: float = 4e-3,
    batch_size: int = 4,
    warmup: int = 20,
    clip_norm: float | None = 1.0,
    hidden_weight: float = 1.0,
    lm_weight: float = 0.0,
    logit_weight: float = 0.0,
    train: Sequence[str] | None = None,
) -> Builder:
    """Train the emulator's blocks on public text; it comes after a selection in a chain, and before a storing stage.

    In the emulated model, with adapter, embeddings and head frozen, AdamW lowers

    `hidden_weight * mean(((h_T - h_S) / rms(h_T))**2) + lm_weight * CE + logit_weight * KL(full || emulated)`,

    where h_T and h_S are the full and the emulated model's hidden states behind each run of middle blocks, given the
    same tokens. The last tenth of the rows is left out of training; what the loss is there before and after is in the
    notes. Interrupted, it goes on from its last checkpoint in the cache, to the same bits; done, it is found there.

    Args:
        steps: Optimiser steps.
        learning_rate: Peak of AdamW's learning rate: linear warm-up, then a cosine to 0. The default suits a model of a
            few million parameters; the authors use 1e-4 for a billion.
        batch_size: Rows of a step.
        warmup: Steps of the warm-up.
        clip_norm: Largest gradient norm; None for no clipping.
        hidden_weight: Of the hidden states' gap.
        lm_weight: Of the emulated model's own loss on the text, in nats a token.
        logit_weight: Of the divergence from the full model's logits, in nats a token.
        train: Of each block, only these: `attention`, `mlp`, `norm`, `harmonizers`; None for all.

    Raises:
        ConfigError: If a setting is out of range; or, when the builder is applied, if there is no public text or too
            little, nothing to train, or a block is stored in a type that cannot be trained.
        ModelError: If the loss becomes infinite or NaN.
        StorageError: If the cache cannot be written.

    Source: G. Xiao, J. Lin, S. Han, Offsite-Tuning: Transfer Learning without Full Model, 2023, arXiv:2302.04870,
    section 3 (distilled emulator).

    Departures: the hidden term alone by default, where the authors' weights are 1 for the text and 30 for the hidden
    states; a gap behind each run of middle blocks if there are several, their mean; weights of zero in a pruned block
    stay zero; a mean over the real tokens only; in fp32, without dropout.
    """
    pace = Pace(steps, learning_rate, batch_size, warmup, clip_norm)
    pace.check()
    weights = Weights(hidden_weight, lm_weight, logit_weight)
    weights.check()
    for part in train or ():
        if part not in PARTS:
            raise ConfigError(f"train={list(train or ())}", f"{part!r} is no part of a block", nearest(part, PARTS))
    settings = {
        "steps": steps,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "warmup": warmup,
        "clip_norm": clip_norm,
        "hidden_weight": hidden_weight,
        "lm_weight": lm_weight,
        "logit_weight": logit_weight,
        "train": None if train is None else list(train),
    }

    def build(blocks: Blocks) -> Blocks:
        context, rows = blocks.needed_context("distilled"), blocks.needed_rows("distilled")
        _check_text(rows)
        wanted = trainable(blocks, PARTS if train is None else train)
        folder = cache_folder(context, _key(blocks, context, rows, settings))
        kept = None if folder is None else read_kept(folder, "result")
        if kept is not None and _fits(kept[0], wanted):
            return _renewed(blocks, kept[0], kept[1]["note"])
        made = _distil(blocks, context, with_labels(rows), wanted, pace, weights, folder)
        if folder is not None:
            write_kept(folder, "result", made[0], {"note": made[1]})
            clear_checkpoints(folder)
        return _renewed(blocks, *made)

    return Builder("distilled", settings, build)


def _check_text(rows: Tensors) -> None:
    if len(rows["input_ids"]) < 2:
        raise ConfigError(
            "emulator stage distilled needs text to train on and text to measure on",
            "there is one row of public text",
            "set data.public_share or data.server_share higher",
        )


def _key(blocks: Blocks, context: BuildContext, rows: Tensors, settings: Mapping[str, Any]) -> dict[str, Any]:
    digests = {
        id(block.module): digest({name: tensor for name, tensor, _ in model_tensors(block.module)})
        for block in blocks.blocks
    }
    described = [
        {"source": block.source, "place": block.place, "changes": list(block.changes), "is": digests[id(block.module)]}
        for block in blocks.blocks
    ]
    return cache_key(context, "distilled", rows, {**settings, "blocks": described})


def _fits(tensors: Tensors, wanted: Mapping[tuple[int, str], nn.Parameter]) -> bool:
    shapes = {name_of(key): parameter.shape for key, parameter in wanted.items()}
    return {name: tensor.shape for name, tensor in tensors.items()} == shapes


def _distil(
    blocks: Blocks,
    context: BuildContext,
    rows: Tensors,
    wanted: Mapping[tuple[int, str], nn.Parameter],
    pace: Pace,
    weights: Weights,
    folder: Path | None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the trained values in the model's dtype, by source and name, and the note."""
    stack = find_blocks(context.model)
    full = EmulatedModel(context.model, stack.path, tuple(range(stack.count)), context.split.adapter)
    count = len(rows["input_ids"])
    train_count = count - max(1, count // _HELD_OUT)
    held_out = {name: tensor[train_count:] for name, tensor in rows.items()}
    before = measure(full, stand_in(context.model, context.split, blocks), held_out, batch_size=context.batch_size)
    student = stand_in(context.model, context.split, blocks)
    parameters = make_trainable(student, blocks, wanted)
    with torch.enable_grad():
        losses = descend(
            parameters,
            _loss_of_steps(Objective(full, student, weights), rows, train_count, pace, context.seed),
            pace,
            folder=folder,
            tell=lambda share: context.tell("distilling the emulator", share),
        )
    trained = {name: value.detach().to(context.model.dtype) for name, value in parameters.items()}
    result = stand_in(context.model, context.split, _renewed(blocks, trained, {}))
    after = measure(full, result, held_out, batch_size=context.batch_size)
    check_finite(after["gap"], pace.steps)
    note = {
        "builder": "distilled",
        "what": "distillation",
        "steps": pace.steps,
        "loss": _points(losses),
        "held_out_before": before["gap"],
        "held_out_after": after["gap"],
        "lm_before": before["lm"],
        "lm_after": after["lm"],
    }
    return trained, note


def _loss_of_steps(
    objective: Objective, rows: Tensors, train_count: int, pace: Pace, seed: int
) -> Callable[[int], torch.Tensor]:
    device = objective.emulated.model.device
    remembered = _remembered(objective, {name: tensor[:train_count] for name, tensor in rows.items()}, pace)

    def loss_at(step: int) -> torch.Tensor:
        chosen = torch.tensor(batch_indices(seed, "distil", count=train_count, size=pace.batch_size, step=step))
        batch = {name: tensor[chosen].to(device) for name, tensor in rows.items()}
        if remembered is None:
            return objective.loss(batch, objective.targets(batch))
        return objective.loss(batch, ([states[chosen].to(device) for states in remembered], None))

    return loss_at


def _remembered(objective: Objective, rows: Tensors, pace: Pace) -> list[torch.Tensor] | None:
    """Return the full model's hidden states on all rows, if that is less work than running it in each step."""
    count, tokens = rows["input_ids"].shape
    config = objective.full.model.config.get_text_config(decoder=True)
    size = count * tokens * config.hidden_size * objective.full.model.dtype.itemsize * len(objective.taps[0])
    if objective.weights.logit or count > pace.steps * pace.batch_size or size > REMEMBERED_BYTES:
        return None
    batches = [objective.targets(batch)[0] for batch in in_batches(rows, pace.batch_size, objective.full.model.device)]
    return [torch.cat(states) for states in zip(*batches, strict=True)]


def _points(losses: Sequence[float]) -> list[list[float]]:
    """Return about `_POINTS` pairs of step and mean loss since the last."""
    width = -(-len(losses) // _POINTS)
    ends = [min(start + width, len(losses)) for start in range(0, len(losses), width)]
    return [[end, sum(losses[start:end]) / (end - start)] for start, end in zip([0, *ends], ends, strict=False)]


def _renewed(blocks: Blocks, tensors: Tensors, note: Any) -> Blocks:
    """Return the blocks with new values, by source and name."""
    device = next(blocks.blocks[0].module.parameters()).device

    def change(block: Block) -> Block:
        own = {
            name.partition(".")[2]: tensor.to(device)
            for name, tensor in tensors.items()
            if name.partition(".")[0] == str(block.source)
        }
        done = any(change["kind"] == "distilled" for change in block.changes)
        changes = block.changes if done else (*block.changes, {"kind": "distilled"})
        return replace(block, module=copy_sharing(block.module, own), changes=changes)

    return replace(blocks.changed(change), notes=(*blocks.notes, note))
