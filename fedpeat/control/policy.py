"""`sabppo`: a learned policy that decides all branches of a round at once; kept as safetensors and JSON."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedpeat.control.features import features
from fedpeat.control.plans import loss_in, round_plan
from fedpeat.control.problem import Observation, Problem
from fedpeat.control.surrogate import Curves, next_loss
from fedpeat.core import ConfigError, RoundPlan, RoundReport, read_json, read_tensors, write_json, write_tensors

FORMAT = 1
WEIGHTS, FACTS = "policy.safetensors", "policy.json"
NAMES = ("trunk_1.weight", "trunk_1.bias", "trunk_2.weight", "trunk_2.bias", "heads.weight", "heads.bias")


@dataclass(frozen=True, eq=False)
class Policy:
    """One trunk of two layers, and a head for each branch.

    Attributes:
        weights: Of the layers, by name, fp32: `(out, in)` and `(out,)`.
        signature: Of the problem that it is made for.
        curves: By whose losses its features are scaled.
        facts: How it was trained, JSON-like.
    """

    weights: Mapping[str, np.ndarray]
    signature: str
    curves: Curves
    facts: Mapping[str, Any] = field(default_factory=dict)

    def logits(self, observed: np.ndarray) -> np.ndarray:
        """Return a number for each level of each branch, `(..., sum of levels)`, from features, `(..., features)`."""
        own = self.weights
        for layer in ("trunk_1", "trunk_2"):
            observed = np.tanh(observed @ own[f"{layer}.weight"].T + own[f"{layer}.bias"])
        return observed @ own["heads.weight"].T + own["heads.bias"]

    def act(self, problem: Problem, observed: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return the likeliest open level of each branch, `(..., branches)`; of equals, the first.

        Args:
            problem: What is decided.
            observed: Features, `(..., features)`.
            mask: Which levels are open, `(..., sum of levels)`.
        """
        scores = np.where(mask, self.logits(observed), -np.inf)
        sizes = problem.menu.branches(len(problem.clients))
        return np.stack([part.argmax(-1) for part in np.split(scores, np.cumsum(sizes)[:-1], axis=-1)], axis=-1)

    def check(self, problem: Problem) -> None:
        """Check that a problem is one that the policy is made for.

        Raises:
            ConfigError: If it has other devices or other levels.
        """
        if self.signature != problem.signature:
            trained = self.facts.get("trained_for", "others")
            found = f"it was trained for {trained}; here are {described(problem)}"
            raise ConfigError("this policy does not fit the run", found, "train one: fedpeat control train")


def described(problem: Problem) -> str:
    """Return in words what a policy's layout depends on."""
    menu = problem.menu
    pairs = ", ".join(pair.emulator if pair.rank is None else f"{pair.emulator} at {pair.rank}" for pair in menu.pairs)
    link = "a radio link" if problem.radio else "fixed links"
    refresh = ", and re-alignment" if menu.refresh else ""
    return (
        f"{len(problem.clients)} devices on {link}, emulators and ranks {pairs}, steps {list(menu.steps)}, shares"
        f" {list(menu.shares)}{refresh}"
    )


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
        "signature": policy.signature,
        "curves": policy.curves.to_json(),
        "facts": dict(policy.facts),
    }
    write_json(Path(folder) / FACTS, facts)


def read_policy(folder: str | Path) -> Policy:
    """Read a policy.

    Raises:
        ConfigError: If it is of another format, or a layer is missing.
        StorageError: If it cannot be read.
    """
    facts = read_json(Path(folder) / FACTS)
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ConfigError(f"cannot use the policy in {folder}", f"its format is not {FORMAT}", "train it anew")
    weights = {name: tensor.numpy().copy() for name, tensor in read_tensors(Path(folder) / WEIGHTS).items()}
    if set(weights) != set(NAMES):
        raise ConfigError(f"cannot use the policy in {folder}", "its layers are not those of a policy", "train it anew")
    return Policy(weights, str(facts["signature"]), Curves.from_json(facts["curves"]), facts["facts"])


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
        """Check that the policy is made for the problem."""
        self.policy.check(self.problem)

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
        action = self.policy.act(problem, observed, problem.menu.flat_mask(problem.fits, seen.available))
        levels, refresh = problem.menu.split(action)
        plan, step = round_plan(problem, seen, levels, int(refresh), state, self.nominal_steps)
        age = 0 if refresh else age
        foretold = float(next_loss(problem, curves, loss, age, levels))
        return plan, {"global_step": step, "loss": foretold, "age": age + 1}
