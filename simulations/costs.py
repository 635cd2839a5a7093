"""What an emulator costs a device and how much of the middle it is, beside the full model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from fedpeat.bundles import Bundle
from fedpeat.client import TrainingSpec
from fedpeat.client.footprint import footprint, step_seconds
from fedpeat.core import DataError, Evaluation, UpdateRefused, count_bytes, digest
from fedpeat.data import POOLED, FederatedData, Rows, open_rows
from fedpeat.emulators import EmulatedModel
from fedpeat.models import LoadedModel, Split, find_blocks, model_tensors, tied_names
from fedpeat.peft import Tuned
from simulations.evaluation import rows_at
from simulations.federation import Federation

Costs = dict[str, dict[str, Any]]
Measured = TypeVar("Measured")


def sizes_of(
    loaded: LoadedModel, split: Split, views: Mapping[str, EmulatedModel], bundles: Mapping[str, Bundle]
) -> Costs:
    """Return how large each emulator is, and what it stands for.

    Args:
        loaded: The full model, before PEFT.
        split: Which of its blocks are the adapter.
        views: The emulated models by key; a bundle without one holds the full model.
        bundles: What devices fetch, by key.

    Returns:
        By key: `emulator_parameters`, `middle_parameters`, `kept_share` (None without a middle), `bundle_bytes` and
        `full_bytes`.
    """
    blocks = find_blocks(loaded.model).of(loaded.model)
    middle = sum(count_parameters(blocks[index]) for index in split.middle)
    whole = full_bytes(loaded.model)

    def size(key: str, bundle: Bundle) -> dict[str, Any]:
        kept = sum(map(count_parameters, emulator_blocks(views[key]))) if key in views else middle
        return {
            "emulator_parameters": kept,
            "middle_parameters": middle,
            "kept_share": kept / middle if middle else None,
            "bundle_bytes": bundle.payload_bytes,
            "full_bytes": whole,
        }

    return {key: size(key, bundle) for key, bundle in bundles.items()}


def emulator_blocks(view: EmulatedModel) -> list[nn.Module]:
    """Return the emulator's blocks; one that stands at several places comes once."""
    stack = view.model.get_submodule(view.path)
    held = {
        source: stack.get_submodule(str(position))
        for position, source in enumerate(view.sources)
        if position not in view.adapter_positions
    }
    return list(held.values())


def count_parameters(block: nn.Module) -> int:
    """Return how many parameters a block computes with: stored layers count by the matrix that they stand for."""
    found: dict[int, int] = {}
    for module in block.modules():
        own = dict(module.named_parameters(recurse=False))
        if is_stored(module):
            found[id(module)] = module.dense(torch.float32).numel()  # type: ignore[operator]
            own = {name: parameter for name, parameter in own.items() if name == "bias"}
        found |= {id(parameter): parameter.numel() for parameter in own.values()}
    return sum(found.values())


def is_stored(module: nn.Module) -> bool:
    """Return whether `module` keeps its weight in another form, and gives it by its method `dense`.

    >>> is_stored(nn.Linear(2, 2))
    False
    """
    # Of the class: in some families an attention layer has a linear layer called `dense`.
    return callable(getattr(type(module), "dense", None))


def full_bytes(model: PreTrainedModel) -> int:
    """Return the tensor payload of a whole model if it were sent as a bundle: ties and equal buffers once."""
    parameters, buffers = {}, {}
    for name, tensor, kind in model_tensors(model):
        (parameters if kind == "parameter" else buffers)[name] = tensor
    tied = tied_names(parameters)
    different = {digest({"": buffer}): buffer for buffer in buffers.values()}
    return count_bytes({n: tensor for n, tensor in parameters.items() if n not in tied}) + count_bytes(different)


def costs_of(sizes: Costs, federation: Federation, data: FederatedData, *, measure: bool) -> Costs:
    """Return each emulator's size and what training it takes, by key, before any training.

    Args:
        sizes: From `sizes_of`.
        federation: The run; its models are left as they were.
        data: Whose rows a step is timed on: those of the client with most.
        measure: Whether memory and time are measured; they are None otherwise, and where the machine's memory does not
            suffice.

    Returns:
        `sizes`, with `zero_shot_ratio`, `client_memory_bytes` and `full_memory_bytes`, what these consist of
        (`client_memory`, `full_memory`: see `Footprint`), `step_seconds` and `full_step_seconds`.
    """
    rows = _scored_rows(data, pooled=POOLED in federation.control.clients) if measure else None
    spec = TrainingSpec(**{**federation.job["spec"], "compile": False})
    full = _needs(federation.full, rows, spec)

    def cost(key: str) -> dict[str, Any]:
        own = _needs(federation.emulated[key], rows, spec) if key in federation.emulated else full
        name = "emulator_zero_shot" if key == "default" else f"emulator_zero_shot/{key}"
        before = federation.zero_shot.get(name, federation.zero_shot["full_zero_shot"])
        return {
            **sizes[key],
            "zero_shot_ratio": perplexity_ratio(before, federation.zero_shot["full_zero_shot"]),
            "client_memory_bytes": own["memory_bytes"],
            "client_memory": own["memory"],
            "full_memory_bytes": full["memory_bytes"],
            "full_memory": full["memory"],
            "step_seconds": own["seconds"],
            "full_step_seconds": full["seconds"],
        }

    return {key: cost(key) for key in sizes}


def perplexity_ratio(one: Evaluation, other: Evaluation) -> float:
    """Return the ratio of two perplexities; infinite where that overflows.

    >>> perplexity_ratio(Evaluation(2.0, 0.1, 9), Evaluation(2.0, 0.2, 9))
    1.0
    """
    return Evaluation(one.loss - other.loss, 0.0, 0).perplexity


def _scored_rows(data: FederatedData, *, pooled: bool) -> Rows | None:
    """Return the rows of the client with most, those without a token to score left out; None if none is left."""
    if data.remote:  # those of clients are on their machines
        rows = open_rows(data.folder, "server", "test")
    else:
        largest = max(data.clients, key=lambda client: (client.rows, client.name))
        rows = open_rows(data.folder, POOLED if pooled else largest.name, "train")
    chosen = (rows.labels[:, 1:] != -100).any(dim=1).nonzero().flatten()
    return rows_at(rows, chosen) if len(chosen) else None


def _needs(tuned: Tuned, rows: Rows | None, spec: TrainingSpec) -> dict[str, Any]:
    if rows is None:
        return dict.fromkeys(("memory_bytes", "memory", "seconds"))
    memory = _if_it_fits(lambda: footprint(tuned, rows, spec))
    seconds = _if_it_fits(lambda: step_seconds(tuned, rows, spec))
    if memory is None:
        return {"memory_bytes": None, "memory": None, "seconds": seconds}
    return {"memory_bytes": memory.total, "memory": asdict(memory), "seconds": seconds}


def _if_it_fits(measure: Callable[[], Measured]) -> Measured | None:
    """Return what `measure` finds; None where it cannot: a model whose loss overflows has no step to be timed."""
    try:
        value = measure()
    except (torch.OutOfMemoryError, MemoryError, UpdateRefused, DataError):
        return None
    return value if not isinstance(value, float) or math.isfinite(value) else None
