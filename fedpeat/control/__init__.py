"""Which plan next?

A controller is a value with one function, `choose(report, state) -> (plan, state)`; it sees only reports.

To add one more: a frozen dataclass in a file of its own, with `start()` and `choose()`, and a YAML in `conf/control/`.
"""

from fedpeat.control.fixed import FixedControl

__all__ = ["FixedControl"]
