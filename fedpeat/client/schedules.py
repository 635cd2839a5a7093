"""How the learning rate follows the federation's global step."""

import math
from collections.abc import Callable, Mapping

from fedpeat.core import ConfigError, nearest

Schedule = Callable[[float], float]
"""From the share of the run that is done after warm-up, 0 to 1, to a factor for the learning rate."""

SCHEDULES: Mapping[str, Schedule] = {
    "constant": lambda _done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def factor(schedule: str, step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Return what the learning rate is multiplied by at a global step.

    It rises linearly over the first `warmup_steps` steps, to 1 at the last of these, then follows `schedule` until
    `total_steps`, and stays at its end from there on. It is not restarted with a round.

    Args:
        schedule: A name in `SCHEDULES`.
        step: The federation's global step, from 0.
        warmup_steps: Steps of the rise.
        total_steps: Steps of the whole run.

    Raises:
        ConfigError: If there is no such schedule.

    >>> [factor("linear", step, warmup_steps=2, total_steps=6) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"cannot use client.schedule={schedule}", "no such schedule", nearest(schedule, SCHEDULES))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return SCHEDULES[schedule](min(1.0, done))
