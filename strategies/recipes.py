"""Complete aggregation rules, one builder each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedpeat.core import ConfigError, nearest
from strategies.reducers import Reducer, weighted_mean
from strategies.server_steps import ServerStep, chain, scale

WEIGHTS = ("tokens", "rows", "equal")


@dataclass(frozen=True)
class Recipe:
    """A complete aggregation rule.

    Attributes:
        name: As in `conf/strategy/`.
        reduce: Many deltas to one.
        server: One delta to a step.
        weight_by: What a client's weight is: `tokens` it trained on in the round, `rows` it holds, or `equal`.
        client: The client's half as data, given to every device in its plan.
        mixes_ranks: Whether devices may use different PEFT ranks.
    """

    name: str
    reduce: Reducer
    server: ServerStep
    weight_by: str = "tokens"
    client: Mapping[str, Any] = field(default_factory=dict)
    mixes_ranks: bool = False

    def __post_init__(self) -> None:
        """Check the weighting.

        Raises:
            ConfigError: If `weight_by` is unknown.
        """
        if self.weight_by not in WEIGHTS:
            raise ConfigError(
                f"strategy.weight_by={self.weight_by}", "no such weighting", nearest(self.weight_by, WEIGHTS)
            )


def fed_avg(*, server_learning_rate: float = 1.0, weight_by: str = "tokens") -> Recipe:
    """Return federated averaging: `x <- x + eta * sum_k p_k (x_k - x)`.

    Args:
        server_learning_rate: eta; 1 replaces the global state by the clients' mean.
        weight_by: `tokens`, `rows` or `equal`.

    Source: McMahan et al. 2017, arXiv 1602.05629, algorithm 1.
    Departures: `p_k` counts the work done in the round (tokens trained on) rather than the data held, as local work is
        a number of steps, not of epochs; `weight_by=rows` gives the paper's weights. On LoRA, averaging the factors A
        and B is not averaging their products (the rule known as FedIT).
    """
    step = chain() if server_learning_rate == 1 else chain(scale(server_learning_rate))
    return Recipe("fed_avg", weighted_mean(), step, weight_by=weight_by)
