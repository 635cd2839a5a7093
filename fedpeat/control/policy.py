"""`sabppo`: a learned policy that decides all branches of a round at once; kept as safetensors and JSON."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedpeat.control.features import COMMON, device_features, features, split_features
from fedpeat.control.outcome import Situation, foretold
from fedpeat.control.plans import loss_in, round_plan
from fedpeat.control.problem import Observation, Problem
from fedpeat.control.signature import difference
from fedpeat.control.surrogate import Curves
from fedpeat.core import ConfigError, RoundPlan, RoundReport, read_json, read_tensors, write_json, write_tensors

FORMAT = 2
PACKAGED = Path(__file__).parent / "packaged"
WEIGHTS, FACTS = "policy.safetensors", "policy.json"
LAYERS = ("encoder_1", "encoder_2", "context", "device", "levels", "refresh")
NAMES = tuple(f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias"))


@dataclass(frozen=True, eq=False)
class Policy:
    """One trunk for all branches, which does not depend on the order of devices.

    The same two layers encode each device; the means and maxima over all devices, with what they have in common, make a
    context. The levels of a device follow from its own code and the context, by layers that all devices share; the
    refresh follows from the context.

    Attributes:
        weights: Of the layers, by name, fp32: `(out, in)` and `(out,)`.
        made_for: What it was trained for, as `fedpeat.control.signature` gives it.
        curves: By whose losses its features are scaled.
        facts: How it was trained, JSON-like.
    """

    weights: Mapping[str, np.ndarray]
    made_for: Mapping[str, Any]
    curves: Curves
    facts: Mapping[str, Any] = field(default_factory=dict)

    def logits(self, own: np.ndarray, common: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return a number for each level: of devices, `(..., devices, levels)`, and of the refresh, `(..., levels)`.

        Args:
            own: Features of devices, `(..., devices, own)`.
            common: Features that they have in common, `(..., common)`.
        """
        code = self._layer("encoder_2", self._layer("encoder_1", own))
        # In parts, since what the devices share need not be repeated for each.
        context = self._layer("context", np.concatenate([code.mean(-2), code.max(-2), common], axis=-1))
        weight, bias = self.weights["device.weight"], self.weights["device.bias"]
        width = code.shape[-1]
        mixed = code @ weight[:, :width].T + (context @ weight[:, width:].T + bias)[..., None, :]
        return self._linear("levels", np.maximum(mixed, 0.0)), self._linear("refresh", context)

    def _layer(self, name: str, inputs: np.ndarray) -> np.ndarray:
        return np.maximum(self._linear(name, inputs), 0.0)

    def _linear(self, name: str, inputs: np.ndarray) -> np.ndarray:
        return inputs @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def act(self, problem: Problem, observed: np.ndarray, available: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the likeliest open level of each branch: `(..., devices, 3)`, and the refresh, `(...)`.

        Args:
            problem: What is decided.
            observed: Features, `(..., features)`.
            available: Who can be asked, `(..., devices)`.
        """
        own, refresh = self.logits(*split_features(problem, observed))
        masks, ends = problem.menu.masks(problem.fits, available), np.cumsum(problem.menu.levels)[:-1]
        parts = zip(np.split(own, ends, axis=-1), masks, strict=True)
        chosen = [np.where(mask, part, -np.inf).argmax(-1) for part, mask in parts]
        return np.stack(chosen, axis=-1), refresh.argmax(-1)

    def check(self, problem: Problem) -> None:
        """Check that a problem is one that the policy is made for.

        Raises:
            ConfigError: If it has other devices or other levels.
        """
        other = difference(self.made_for, problem)
        if other:
            raise ConfigError("this policy does not fit the run", other, "train one for it: fedpeat control train")


def shapes(problem: Problem, width: int) -> dict[str, tuple[int, int]]:
    """Return outputs and inputs of each layer, of so many numbers a code."""
    own = device_features(problem)
    return {
        "encoder_1": (width, own),
        "encoder_2": (width, width),
        "context": (width, 2 * width + COMMON),
        "device": (width, 2 * width),
        "levels": (sum(problem.menu.levels), width),
        "refresh": (1 + problem.menu.refresh, width),
    }


def write_policy(folder: str | Path, policy: Policy) -> None:
    """Write a policy as two files in a folder.

    Raises:
        StorageError: If it cannot be written.
    """
    import torch

    tensors = {name: torch.from_numpy(np.ascontiguousarray(weight)) for name, weight in policy.weights.items()}
    write_tensors(Path(folder) / WEIGHTS, tensors)
    facts = {
        "format": FORMAT,
        "made_for": dict(policy.made_for),
        "curves": policy.curves.to_json(),
        "facts": dict(policy.facts),
    }
    write_json(Path(folder) / FACTS, facts)


def read_policy(folder: str | Path) -> Policy:
    """Read a policy.

    Raises:
        ConfigError: If it is of another format, or a layer is missing or not finite.
        StorageError: If it cannot be read.
    """
    facts = read_json(Path(folder) / FACTS)
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise _unusable(folder, f"its format is not {FORMAT}")
    if not all(isinstance(facts.get(key), dict) for key in ("made_for", "curves", "facts")):
        raise _unusable(folder, f"{FACTS} does not say what it was made for")
    weights = {name: tensor.numpy().copy() for name, tensor in read_tensors(Path(folder) / WEIGHTS).items()}
    if set(weights) != set(NAMES) or not all(np.isfinite(weight).all() for weight in weights.values()):
        raise _unusable(folder, "its layers are not those of a policy")
    return Policy(weights, facts["made_for"], Curves.from_json(facts["curves"]), facts["facts"])


def packaged_policy() -> Policy:
    """Return the policy that comes with the package: that of `experiment=adaptive` and its seed's devices."""
    return read_policy(PACKAGED)


def _unusable(folder: str | Path, found: str) -> ConfigError:
    return ConfigError(f"cannot use the policy in {folder}", found, "train it anew: fedpeat control train")


@dataclass(frozen=True)
class SabppoControl:
    """Decide by a learned policy, always the likeliest level of each branch.

    Attributes:
        problem: What there is to decide.
        policy: Who decides.
        nominal_steps: The run's own local steps.

    Source: a reconstruction of FedPEAT's SABPPO (single-agent action-branching PPO), Chua et al. 2023,
        arXiv:2310.17491.
    Departures: a device's participation, emulator and rank are one branch, since memory closes them together; no branch
        for the power that a device radiates.
    """

    problem: Problem
    policy: Policy
    nominal_steps: int

    def __post_init__(self) -> None:
        """Check that the policy is made for the problem.

        Raises:
            ConfigError: If it is not, or its layers have other shapes.
        """
        self.policy.check(self.problem)
        weights = self.policy.weights
        wanted = shapes(self.problem, len(weights["encoder_1.bias"]))
        for layer, shape in wanted.items():
            if weights[f"{layer}.weight"].shape != shape or weights[f"{layer}.bias"].shape != shape[:1]:
                found = f"layer {layer} is {weights[f'{layer}.weight'].shape}, not {shape}"
                raise ConfigError("this policy does not fit the run", found, "train one for it: fedpeat control train")

    def start(self) -> dict[str, Any]:
        """Return the controller's state before round 1."""
        return {"global_step": 0, "loss": self.policy.curves.start, "age": 0}

    def choose(
        self, report: RoundReport | None, state: Mapping[str, Any], seen: Observation
    ) -> tuple[RoundPlan, dict[str, Any]]:
        """Return the plan of the round that is `seen`, and the next state."""
        problem, curves, measured, age = self.problem, self.policy.curves, loss_in(report), int(state["age"])
        loss = float(state["loss"]) if measured is None or not math.isfinite(measured) else measured
        observed = features(problem, curves, seen, np.array(loss), np.array(age))
        levels, refresh = self.policy.act(problem, observed, seen.available)
        plan, step = round_plan(problem, seen, levels, int(refresh), state, self.nominal_steps)
        _, after = foretold(problem, curves, seen, (levels, refresh), Situation(loss, age))
        return plan, {"global_step": step, "loss": float(after), "age": 1 if refresh else age + 1}
