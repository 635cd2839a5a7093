"""Which plan next?

A controller is a value with one function, `choose(report, state, seen) -> (plan, state)`; it sees reports, and what is
known of the coming round. Its state is JSON and in the checkpoint.

To add one more: a frozen dataclass in a file of its own, with `start()` and `choose()`, and a YAML in `conf/control/`.
"""

from fedpeat.control.fitted import Fit, read_fit
from fedpeat.control.fixed import FixedControl
from fedpeat.control.greedy import GreedyControl
from fedpeat.control.menu import Menu, Pair
from fedpeat.control.objective import (
    Objective,
    Price,
    bytes_term,
    cost,
    energy_term,
    price,
    quality_term,
    time_term,
)
from fedpeat.control.policy import Policy, SabppoControl, packaged_policy, read_policy, write_policy
from fedpeat.control.problem import Observation, Problem
from fedpeat.control.rules import CapabilityControl, RandomControl
from fedpeat.control.surrogate import Curves, next_loss

__all__ = [
    "CapabilityControl",
    "Curves",
    "Fit",
    "FixedControl",
    "GreedyControl",
    "Menu",
    "Objective",
    "Observation",
    "Pair",
    "Policy",
    "Price",
    "Problem",
    "RandomControl",
    "SabppoControl",
    "bytes_term",
    "cost",
    "energy_term",
    "next_loss",
    "packaged_policy",
    "price",
    "quality_term",
    "read_fit",
    "read_policy",
    "time_term",
    "write_policy",
]
