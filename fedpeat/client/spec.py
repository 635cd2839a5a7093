"""How a device trains: the settings of local training, and what a recipe asks of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedpeat.client.schedules import SCHEDULES
from fedpeat.core import ConfigError, Tensors, nearest

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class TrainingSpec:
    """How to train locally.

    Attributes:
        learning_rate: The optimiser's, before the schedule's factor.
        batch_size: Rows a forward pass.
        optimizer: A class of `torch.optim`.
        optimizer_options: Its keywords, the learning rate apart.
        optimizer_state: `reset` for a fresh optimiser each round, `keep` to go on from the client's last one.
        schedule: Of the learning rate, over the federation's global step: a name in `SCHEDULES`.
        warmup_steps: Global steps of linear rise before the schedule.
        clip_norm: Largest Euclidean norm of a step's gradient, None for no limit.
        accumulate: Forward passes an optimiser step; their tokens weigh alike, as if they were one batch.
        precision: `fp32`, or `bf16` for a forward pass under autocast; the trainable tensors are fp32 in both.
        threads: Torch threads; their number changes float sums.
        compile: Compile the forward pass and the loss, once a model.
        prefix_mib: Disk for hidden states in front of the first block that trains, MiB a client; 0 keeps none.
    """

    learning_rate: float
    batch_size: int
    optimizer: str = "AdamW"
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    optimizer_state: str = "reset"
    schedule: str = "constant"
    warmup_steps: int = 0
    clip_norm: float | None = None
    accumulate: int = 1
    precision: str = "fp32"
    threads: int = 1
    compile: bool = False
    prefix_mib: float = 0.0

    def __post_init__(self) -> None:
        """Check values.

        Raises:
            ConfigError: If one is out of range or unknown.
        """
        for key, options in (
            ("optimizer_state", ("reset", "keep")),
            ("schedule", tuple(SCHEDULES)),
            ("precision", PRECISIONS),
        ):
            value = getattr(self, key)
            if value not in options:
                raise ConfigError(f"cannot use client.{key}={value}", "no such choice", nearest(str(value), options))
        for key, least in (
            ("learning_rate", 0),
            ("batch_size", 1),
            ("warmup_steps", 0),
            ("accumulate", 1),
            ("threads", 1),
            ("prefix_mib", 0),
        ):
            value = getattr(self, key)
            if not value >= least:
                raise ConfigError(
                    f"cannot use client.{key}={value}", f"it must be {least} or more", f"raise client.{key}"
                )
        if self.compile and self.prefix_mib:
            raise ConfigError(
                f"cannot use client.prefix_mib={self.prefix_mib} with client.compile=true",
                "a compiled step has no place to begin at a later block",
                "choose one of them",
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(
                f"cannot use client.clip_norm={self.clip_norm}", "it must be positive", "use null for none"
            )


@dataclass(frozen=True)
class Guidance:
    """What a recipe adds to each local step.

    Attributes:
        proximal_mu: Weight of the pull towards the round's start, `mu / 2 * |local - start|^2` (FedProx).
        correction: Added to the gradients, by name (SCAFFOLD's `c - c_k`).
        record_gradients: Whether the mean of the raw gradients over the steps is wanted.
        tail_penalty: `(weight, share)`: the loss gains `weight * |B[:, k:]| * |A[k:]|` for each LoRA layer, `k` being
            the whole part of `share` times its rank (HetLoRA); None for none.
    """

    proximal_mu: float = 0.0
    correction: Tensors = field(default_factory=dict)
    record_gradients: bool = False
    tail_penalty: tuple[float, float] | None = None


NO_GUIDANCE = Guidance()
