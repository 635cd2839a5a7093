"""Keeping the emulator in step with the adapter: low-rank changes of its linear layers, trained between rounds."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedpeat.core import ConfigError, ModelError, Tensors, seed_for, shorten
from fedpeat.emulators.assemble import EmulatedModel
from fedpeat.emulators.training.loop import Pace, batch_indices, descend
from fedpeat.emulators.training.objective import Objective, Weights, with_labels
from fedpeat.models import SUBLAYERS, linear_layers, sublayers

A, B = "realign_A", "realign_B"
"""How the factors' names end: `model.layers.5.mlp.up_proj.realign_A`."""

PACE = Pace(steps=10, learning_rate=3e-3, batch_size=8, warmup=0, clip_norm=1.0)
WEIGHTS = Weights(hidden=1.0, lm=0.0, logit=0.0)

_PLAIN = (nn.Linear, Conv1D)


class Realignment(NamedTuple):
    """What a re-alignment found.

    Attributes:
        tensors: A `(rank, in)` and B `(out, rank)` by canonical name, fp32, on the CPU.
        losses: Of each step.
    """

    tensors: dict[str, torch.Tensor]
    losses: list[float]


class EmulatorLora:
    """The emulator's linear layers in one emulated model, with what they were before anything was added to them.

    Args:
        view: The emulated model; changed only by `apply`. PEFT may be attached to its adapter.
        scaling: The factor before B A.

    Raises:
        ModelError: If a linear layer of the emulator is stored in a compressed form, or there is none.
    """

    def __init__(self, view: EmulatedModel, *, scaling: float = 1.0) -> None:
        self.view = view
        self.scaling = scaling
        self.layers = _layers(view)
        self._originals = {name: modules[0].weight.detach() for name, modules in self.layers.items()}

    def apply(self, tensors: Tensors) -> None:
        """Set each layer's weight to `original + scaling * B A`; without factors, to the original itself.

        The originals' memory is not written to: it may be a bundle's file, or the full model's.

        Raises:
            ModelError: If the factors are for other layers, or mis-shaped; nothing is changed then.
        """
        strangers = set(tensors) - {f"{name}.{part}" for name in self.layers for part in (A, B)}
        if strangers:
            found = f"the emulator has no layer for {shorten(sorted(strangers), 3)}"
            raise ModelError("cannot re-align an emulator", found, "both ends must use the same emulator")
        weights = {name: self._weight(name, tensors) for name in self.layers}
        for name, modules in self.layers.items():
            for module in modules:
                module.weight.data = weights[name]

    def _weight(self, name: str, tensors: Tensors) -> torch.Tensor:
        original = self._originals[name]
        if f"{name}.{A}" not in tensors and f"{name}.{B}" not in tensors:
            return original
        a, b = (tensors.get(f"{name}.{part}", torch.empty(0, 0)).to(original.device, torch.float32) for part in (A, B))
        wide, tall = _shape(self.layers[name][0])[::-1]
        if a.shape[1:] != (wide,) or b.shape[:1] != (tall,) or a.shape[0] != b.shape[1]:
            found = f"{name!r} takes A (rank, {wide}) and B ({tall}, rank), got {tuple(a.shape)} and {tuple(b.shape)}"
            raise ModelError("cannot re-align an emulator", found, "both ends must use the same emulator and rank")
        change = self.scaling * (b @ a)
        change = change.T if isinstance(self.layers[name][0], Conv1D) else change
        return (original.float() + change).to(original.dtype)

    @contextmanager
    def originals(self) -> Iterator[None]:
        """Show the layers with their original weights for a while."""
        present = {name: modules[0].weight.data for name, modules in self.layers.items()}
        self.apply({})
        try:
            yield
        finally:
            for name, modules in self.layers.items():
                for module in modules:
                    module.weight.data = present[name]


def _layers(view: EmulatedModel) -> dict[str, tuple[nn.Linear | Conv1D, ...]]:
    found: dict[str, tuple[nn.Linear | Conv1D, ...]] = {}
    for position, source in enumerate(view.sources):
        if position in view.adapter_positions:
            continue
        block = view.model.get_submodule(f"{view.path}.{position}")
        for name, module in _plain_layers(block, source).items():
            canonical = f"{view.path}.{source}.{name}"
            found[canonical] = (*found.get(canonical, ()), module)
    if not found:
        raise ModelError(
            "cannot re-align this emulator", "it has no linear layers", "keep blocks, or do without re-alignment"
        )
    return found


def _plain_layers(block: nn.Module, source: int) -> dict[str, nn.Linear | Conv1D]:
    for path, module in block.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        stored = any(not tensor.is_floating_point() and tensor.dtype != torch.bool for tensor in own)
        if stored or (isinstance(module, _PLAIN) and type(module) not in _PLAIN):
            raise ModelError(
                f"cannot re-align block {source} of the emulator",
                f"its {path or 'block'!r} is stored as a {type(module).__name__}",
                "leave the storing stage of the emulator out, or do without re-alignment",
            )
    return linear_layers(block)


def _shape(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """Return `(out, in)`; GPT-2's `Conv1D` holds its weight transposed."""
    first, second = module.weight.shape
    return (second, first) if isinstance(module, Conv1D) else (first, second)


@dataclass(frozen=True, eq=False)
class Realigner:
    """Trains low-rank changes of the emulator so that it does the middle's work for the adapter as it is now.

    Both models are used with what is in them at the time of the call (the adapter's current tensors, which the caller
    has written into both), and are left as they were: weights, gradients, hooks and mode.

    Attributes:
        full: The full model with the current adapter.
        lora: The emulator's layers, in the emulated model with the current adapter.
        rows: Public text, as in `BuildContext`.
        rank: Of the changes.
        pace: How to descend; a step's batch and learning rate follow from the round and the step alone.
        weights: Of hidden gap, text and logits.
        sublayers: Only the layers of these: some of `attention`, `mlp`; None for all.
        seed: The run's.

    Raises:
        ConfigError: If the rank or a sublayer is out of range, or there is no text.

    Source: F. Wu, Z. Li, Y. Li, B. Ding, J. Gao, FedBiOT: LLM Local Fine-tuning in Federated Learning without Full
    Model, 2024, arXiv:2406.17706, section 4 (the server's side: emulator alignment).

    Departures: the squared hidden gap behind each run of middle blocks, relative to the full model's, and KL(full ||
    emulated); AdamW starts anew with each call. The adapter's own factors do not train here.
    """

    full: EmulatedModel
    lora: EmulatorLora
    rows: Tensors = field(repr=False)
    rank: int = 8
    pace: Pace = PACE
    weights: Weights = WEIGHTS
    sublayers: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        self.pace.check()
        self.weights.check()
        if self.rank < 1 or not set(self.sublayers or ()) <= set(SUBLAYERS):
            found = f"rank={self.rank}, sublayers={self.sublayers}"
            raise ConfigError("cannot re-align an emulator so", found, f"set rank >= 1, sublayers of {SUBLAYERS}")
        if not len(self.rows["input_ids"]):
            raise ConfigError("cannot re-align an emulator", "the server has no public text", "set data.public_share")

    def start(self) -> dict[str, torch.Tensor]:
        """Return factors that change nothing: A random, B zero; alike wherever it is called with this seed."""
        tensors = {}
        for name, modules in self._chosen().items():
            out, width = _shape(modules[0])
            generator = torch.Generator().manual_seed(seed_for(self.seed, "realign", name))
            tensors[f"{name}.{A}"] = torch.randn(self.rank, width, generator=generator) / width**0.5
            tensors[f"{name}.{B}"] = torch.zeros(out, self.rank)
        return tensors

    def __call__(self, tensors: Tensors | None = None, *, round_number: int = 0) -> Realignment:
        """Take the steps of a round.

        Args:
            tensors: The factors so far, from an earlier call; None for `start()`.
            round_number: Which rows come next follows from it.

        Raises:
            ModelError: If the loss is not finite, or the factors do not fit.
        """
        first = self.start() if tensors is None else tensors
        device = self.lora.view.model.device
        with _as_they_are(self.full.model, self.lora.view.model), torch.enable_grad(), self.lora.originals():
            parameters = {
                name: nn.Parameter(tensor.to(device, torch.float32, copy=True)) for name, tensor in first.items()
            }
            with _attached(self._chosen(), parameters, self.lora.scaling):
                losses = descend(parameters, self._loss_of_steps(round_number), self.pace)
        return Realignment({name: value.detach().cpu() for name, value in parameters.items()}, losses)

    def _chosen(self) -> Mapping[str, tuple[nn.Linear | Conv1D, ...]]:
        if self.sublayers is None:
            return self.lora.layers
        view, kinds = self.lora.view, {}
        for position, source in enumerate(view.sources):
            block = view.model.get_submodule(f"{view.path}.{position}")
            kinds |= {f"{view.path}.{source}.{name}": kind for name, kind in sublayers(block).items()}
        return {
            name: modules for name, modules in self.lora.layers.items() if kinds[f"{name}.weight"] in self.sublayers
        }

    def _loss_of_steps(self, round_number: int) -> Callable[[int], torch.Tensor]:
        objective = Objective(self.full, self.lora.view, self.weights)
        rows, device = with_labels(self.rows), self.lora.view.model.device
        count, size = len(rows["input_ids"]), self.pace.batch_size

        def loss_at(step: int) -> torch.Tensor:
            step += round_number * self.pace.steps
            chosen = torch.tensor(batch_indices(self.seed, "realign", count=count, size=size, step=step))
            batch = {name: tensor[chosen].to(device) for name, tensor in rows.items()}
            return objective.loss(batch, objective.targets(batch))

        return loss_at


@contextmanager
def _as_they_are(*models: nn.Module) -> Iterator[None]:
    """Turn models to evaluation for a while; what was in training mode is so again afterwards."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _attached(
    layers: Mapping[str, tuple[nn.Linear | Conv1D, ...]], parameters: Mapping[str, nn.Parameter], scaling: float
) -> Iterator[None]:
    def adding(name: str) -> Callable[..., torch.Tensor]:
        a, b = parameters[f"{name}.{A}"], parameters[f"{name}.{B}"]

        def add(_module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            return output + (scaling * (args[0].float() @ a.T @ b.T)).to(output.dtype)

        return add

    handles = [module.register_forward_hook(adding(name)) for name, own in layers.items() for module in own]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
