"""What a device needs to train a model: memory, counted tensor by tensor, and the time of a step."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch.autograd.graph import saved_tensors_hooks

from fedpeat.client.spec import TrainingSpec
from fedpeat.client.train import train
from fedpeat.core import count_bytes
from fedpeat.data import Rows
from fedpeat.models import model_tensors
from fedpeat.peft import Tuned

_NOBODY = {"seed": 0, "client": ""}


@dataclass(frozen=True)
class Footprint:
    """Memory of local training, bytes. What a kernel needs for a moment, and what an allocator wastes, is not in it.

    Attributes:
        weights: Every parameter and buffer as it is stored, each storage once; PEFT's own tensors too.
        gradients: Of the trainable tensors.
        optimizer: What the optimiser remembers of them.
        activations: What autograd keeps of one forward pass for the backward pass.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """The sum: an upper bound of what is there at once, since activations go as gradients come."""
        return self.weights + self.gradients + self.optimizer + self.activations


def footprint(tuned: Tuned, rows: Rows, spec: TrainingSpec) -> Footprint:
    """Count what local training keeps in memory, by one real step; `tuned` is left as it was.

    The step is that of `train`, at a learning rate of 0, so that nothing moves. Activations are counted in the forward
    pass of `spec.batch_size` rows: with `spec.accumulate`, each pass has its own. Numbers of Python's that a tensor was
    multiplied by do not count; a compiled model may keep less.

    Args:
        tuned: The model.
        rows: Any rows of as many tokens as it will train on; those of the first batch need a token to score.
        spec: How it will train.

    Raises:
        ConfigError: If the optimiser cannot be built.
        DataError: If there are no rows, or no token to score.
        UpdateRefused: If the loss is not finite.
    """
    weights = {(one.device, one.data_ptr(), one.nbytes): one.nbytes for _, one, _ in model_tensors(tuned.model)}
    plain = replace(spec, learning_rate=0.0, accumulate=1, compile=False, optimizer_state="keep")
    own = {_place(one) for _, one, _ in model_tensors(tuned.model)}
    with _saved_for_backward() as saved:
        result = train(tuned, rows, spec=plain, steps=1, start_step=0, total_steps=1, **_NOBODY)
    return Footprint(
        weights=sum(weights.values()),
        gradients=sum(parameter.nbytes for parameter in tuned.parameters),
        optimizer=count_bytes(result.optimizer_state or {}),
        activations=sum(storage.nbytes() for place, storage in saved.items() if place not in own),
    )


def step_seconds(tuned: Tuned, rows: Rows, spec: TrainingSpec, *, steps: int = 3) -> float:
    """Return the median wall time of a local training step, s, after one that does not count.

    `tuned` is left as it was.

    Args:
        tuned: The model.
        rows: What to train on; each batch needs a token to score.
        spec: How; the learning rate is taken as 0, so that nothing moves.
        steps: How many are timed.

    Raises:
        ConfigError: If the optimiser cannot be built.
        DataError: If there are no rows, or no token to score.
        UpdateRefused: If the loss is not finite.
    """
    plain = replace(spec, learning_rate=0.0, optimizer_state="reset")
    times = [
        train(tuned, rows, spec=plain, steps=1, start_step=step, total_steps=steps + 1, **_NOBODY).metrics
        for step in range(steps + 1)
    ]
    return median(metrics["train_seconds"] for metrics in times[1:])


def _place(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


@contextmanager
def _saved_for_backward() -> Iterator[dict[tuple[torch.device, int], torch.UntypedStorage]]:
    """Collect the storages of all tensors that autograd keeps in here, by place.

    They are held until the end: memory that was freed and used again would look like one storage.
    """
    saved: dict[tuple[torch.device, int], torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.setdefault(_place(tensor), tensor.untyped_storage())
        return tensor.detach()  # an operation's own output, kept as it is, would hold itself for ever

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
