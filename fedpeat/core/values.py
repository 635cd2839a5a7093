"""The frozen values that pass between rooms, one way, once a round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fedpeat.core.tree import Tensors


@dataclass(frozen=True)
class DevicePlan:
    """What one device does in one round.

    Attributes:
        client: The client's name; seeds and order follow it.
        local_steps: Optimiser steps.
        emulator: Key of the emulator it trains against (`"default"`, or a name from the run's ladder).
        rank: PEFT rank, or None for the run's own; others only where the recipe can mix ranks.
        extras: What differs for this device from the recipe's client half (`proximal_mu`, `train_only`, ...).
        band: Its weight in sharing out the bands of a radio link.
    """

    client: str
    local_steps: int
    emulator: str = "default"
    rank: int | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    band: float = 1.0


@dataclass(frozen=True)
class RoundPlan:
    """The frozen decisions for one round.

    Attributes:
        round: Counted from 1.
        start_step: The federation's global step at which local training starts (schedules and data order follow it).
        total_steps: Global steps of the whole run (where schedules end).
        devices: One plan a device, ordered by client name, or in the order of the draw where not all are waited for.
        refresh: Whether the emulator is re-aligned before this round; None for as the run's settings say.
    """

    round: int
    start_step: int
    total_steps: int
    devices: tuple[DevicePlan, ...]
    refresh: bool | None = None


@dataclass(frozen=True)
class ClientUpdate:
    """What one participant gives back after a round of training.

    Attributes:
        client: Its name (`"server"` for the server's own training).
        round: The round it belongs to.
        delta: `local - global` for each travelling tensor that the recipe has sent, fp32, by canonical name; on its
            way, what `encoding` made of it.
        weight: Its share in a weighted mean, before normalising.
        metrics: Numbers by metric name (`train_loss`, `train_tokens`, `train_seconds`, ...).
        extras: What a recipe has clients send beside the delta (changes of control variates), by name.
        encoding: The codec's description while `delta` is encoded; empty once it is a delta again.
        payload_bytes: Tensor bytes that came over the wire; None for what never travelled.
        bundle: Version of the bundle that it was made with; empty where there was none.
    """

    client: str
    round: int
    delta: Tensors
    weight: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    extras: Tensors = field(default_factory=dict)
    encoding: Mapping[str, Any] = field(default_factory=dict)
    payload_bytes: int | None = None
    bundle: str = ""


@dataclass(frozen=True)
class ClientFailure:
    """Why one client's work did not count.

    `kind` is error, timeout, surplus (not waited for), refused or died; or late, dropped or memory, in simulated time.
    """

    client: str
    round: int
    kind: str
    reason: str


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts held-out tokens.

    Attributes:
        loss: Mean cross-entropy, nats a token.
        accuracy: Share of next tokens predicted exactly, 0 to 1.
        tokens: Tokens scored.
        choice_accuracy: Share of held-out documents whose right answer was the likeliest, 0 to 1; None where the data
            has no choices.
    """

    loss: float
    accuracy: float
    tokens: int
    choice_accuracy: float | None = None

    @property
    def perplexity(self) -> float:
        """`exp(loss)`; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def to_json(self) -> dict[str, float]:
        """Return loss, perplexity, accuracy and tokens, and the choice accuracy where there is one."""
        plain = {"loss": self.loss, "perplexity": self.perplexity, "accuracy": self.accuracy, "tokens": self.tokens}
        return plain if self.choice_accuracy is None else {**plain, "choice_accuracy": self.choice_accuracy}


@dataclass(frozen=True)
class RoundReport:
    """What happened in one round: one line of `metrics.jsonl`.

    Attributes:
        round: Counted from 1; 0 is the state before any training.
        clients: Metrics of each participant that counted, by name: `weight`, `train_loss`, `train_tokens`,
            `train_seconds`, `bytes_down`, `bytes_up`, `delta_norm`, `peak_rss_mib`, ...
        failures: Who failed, and why.
        evaluations: By model: `full_zero_shot`, `emulator_zero_shot`, `emulator_tuned`, `plug_in` (and
            `emulator_tuned/<key>` for further emulators); empty in rounds without evaluation.
        bytes_down: Tensor payload sent to all clients, bytes.
        bytes_up: Tensor payload received from all clients, bytes.
        seconds: Wall time by part: `total`, `train`, `evaluate`, `wire`, `overhead`.
        metrics: Further numbers of the round (`train_loss`, `update_norm`, `tokens_per_second`, `privacy_margin`, ...).
        devices: What became of each device, by name, JSON-like: `status`, `emulator`, `local_steps`, `bytes_down`,
            `bundle_bytes`, `holds` (whether it holds its bundle now), and what was modelled of it (see
            `fedpeat.devices.COLUMNS`).
    """

    round: int
    clients: Mapping[str, Mapping[str, float]]
    failures: tuple[ClientFailure, ...]
    evaluations: Mapping[str, Evaluation]
    bytes_down: int
    bytes_up: int
    seconds: Mapping[str, float]
    metrics: Mapping[str, float]
    devices: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and strings."""
        plain = asdict(self)
        plain["evaluations"] = {name: result.to_json() for name, result in self.evaluations.items()}
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> RoundReport:
        """Return the report that `to_json` was called on."""
        evaluations = {
            name: Evaluation(
                loss=_number(result["loss"]),
                accuracy=_number(result["accuracy"]),
                tokens=int(result["tokens"]),
                choice_accuracy=result.get("choice_accuracy"),
            )
            for name, result in plain["evaluations"].items()
        }
        failures = tuple(ClientFailure(**failure) for failure in plain["failures"])
        return cls(**{**plain, "evaluations": evaluations, "failures": failures})


def _number(value: float | None) -> float:
    """Return a number from JSON, which has null for NaN."""
    return math.nan if value is None else float(value)


@dataclass(frozen=True)
class GlobalState:
    """What a federation has learnt.

    Attributes:
        tensors: The travelling tensors, fp32, by canonical name.
        folds: What a recipe has added to base weights of the adapter blocks since the start, fp32, `(out, in)`, by the
            LoRA layer's canonical name.
        memory: What a recipe remembers on the server (momentum, control variates), by name.
    """

    tensors: Tensors
    folds: Tensors = field(default_factory=dict)
    memory: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class RunState:
    """Everything of the server that survives a round: a checkpoint is this value, written down.

    Attributes:
        round: The last finished round; 0 before the first.
        shared: What the federation has learnt.
        control_state: State of the controller, JSON-like.
        global_step: The federation's step after `round`.
        seed: The run's seed; samplers and all other random choices are derived from it, so they need no state.
        emulator: What re-alignment changed of the emulator, by name; empty without it.
        counted: The rounds in which a client's update counted, by name, as far back as the run may be resumed from: the
            index to what clients keep on their own disks.
        resumed: The rounds after which the run was resumed, oldest first.
        repeated: How many finished rounds were done once more, since their checkpoints were damaged.
    """

    round: int
    shared: GlobalState
    control_state: Mapping[str, Any]
    global_step: int
    seed: int
    emulator: Tensors = field(default_factory=dict)
    counted: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    resumed: tuple[int, ...] = ()
    repeated: int = 0
