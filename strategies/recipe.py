"""A complete aggregation rule as a value: reducer, server step, the client's half, and what is known of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedpeat.core import ConfigError, Tensors, nearest
from strategies.reducers import Reducer, Situation
from strategies.server_steps import ServerStep, chain

WEIGHTS = ("tokens", "rows", "equal")

EXACT = ("yes", "best rank-r", "approximate", "no", "personal", "robust", "no factors")
"""How near a rule's step comes to the weighted mean of the clients' products on LoRA: equal to it, its best
approximation of the rank, a closer one than averaging factors, no; meaningless with personal tensors, for robust rules
(which are to leave the mean) and for rules that leave no factors."""


@dataclass(frozen=True)
class Facts:
    """What a comparison table says of a rule beside what can be counted.

    Attributes:
        family: `general`, `lora`, `robust` or `flower`.
        source: Authors, year and arXiv id.
        exact: One of `EXACT`.
        client_state: What clients keep between rounds, in words; "" if nothing.
        linear: Whether the server needs no more than one weighted sum of what clients send, so that secure aggregation
            fits.
        of_mean: Whether the step follows from the state and the plain mean of the clients' deltas alone, so that noise
            on their sum makes all of it private.
        server_takes_part: Whether the server's own update counts like a client's: `yes`, `no`, or `needed`.
        needs: What travels: `any` tensors, LoRA `pairs`, or square `cores`.
        rebases: Whether a round changes the basis that factors are in, so that what a client remembers of one round
            (error feedback) means nothing in the next.
        note: One more thing to know, a sentence.
    """

    family: str = "general"
    source: str = ""
    exact: str = "no"
    client_state: str = ""
    linear: bool = False
    of_mean: bool = False
    server_takes_part: str = "yes"
    needs: str = "any"
    rebases: bool = False
    note: str = ""


def every_round(**half: Any) -> Callable[[int], Mapping[str, Any]]:
    """Return a client half that is the same in each round.

    >>> every_round(train_only=["B"])(3)
    {'train_only': ['B']}
    """
    return lambda _: half


def no_half(_: int) -> Mapping[str, Any]:
    """Ask nothing of clients but plain training."""
    return {}


def nothing_more(_: Situation) -> dict[str, Any]:
    """Send nothing beside the travelling tensors and folds."""
    return {}


@dataclass(frozen=True)
class Recipe:
    """A complete aggregation rule.

    Attributes:
        name: As in `conf/strategy/`.
        reduce: Many updates to one step.
        server: The step's travelling part to the one that is taken.
        weight_by: What a client's weight is: `tokens` it trained on in the round, `rows` it holds, or `equal`.
        client: A round's client half as data, given to every device in its plan. Keys that clients know:
            `proximal_mu` (weight of the pull to the round's start); `train_only` (parts that train and are sent: of
            `A`, `B`, `R`, `other`; all without it); `fixed` (parts that keep their values from the start and are sent
            in neither direction); `personal` (parts that each client trains and keeps); `control_variates` (correct
            gradients by `extras` from the server and the client's own, send the change); `probe_rows` (score so many
            own rows before training, as `start_loss`); `tail_penalty` (`[weight, share]`: the local loss gains
            `weight * |B[:, k:]| * |A[k:]|` for each LoRA layer, `k` the whole part of `share` times its rank, HetLoRA);
            `clip_delta` (scale the delta to a norm of `extras["clip_norm"]` at most, and say in the metric `clipped`
            whether that was needed).
        sends: What the server sends to all devices beside travelling tensors and folds, by name.
        mixes_ranks: Whether devices may use different PEFT ranks.
        always: Whether a round that nobody took part in makes a step too.
        facts: What the comparison table says of it.
    """

    name: str
    reduce: Reducer
    server: ServerStep = field(default_factory=chain)
    weight_by: str = "tokens"
    client: Callable[[int], Mapping[str, Any]] = no_half
    sends: Callable[[Situation], Tensors] = nothing_more
    mixes_ranks: bool = False
    always: bool = False
    facts: Facts = field(default_factory=Facts)

    def __post_init__(self) -> None:
        """Check the weighting and the facts.

        Raises:
            ConfigError: If `weight_by` is unknown.
        """
        if self.weight_by not in WEIGHTS:
            raise ConfigError(
                f"strategy.weight_by={self.weight_by}", "no such weighting", nearest(self.weight_by, WEIGHTS)
            )
        if self.facts.exact not in EXACT:
            raise ConfigError(f"facts.exact={self.facts.exact}", "no such degree", nearest(self.facts.exact, EXACT))


def in_range(strategy: str, key: str, value: float, least: float, most: float = float("inf")) -> float:
    """Return `value` if it lies between `least` and `most`.

    Raises:
        ConfigError: If it does not; the bounds themselves are allowed.

    >>> in_range("fed_prox", "proximal_mu", 0.1, 0)
    0.1
    """
    if not least <= value <= most:
        bounds = f"{least} or more" if most == float("inf") else f"between {least} and {most}"
        raise ConfigError(
            f"cannot use strategy.{key}={value} with strategy={strategy}",
            f"it must be {bounds}",
            f"change strategy.{key}",
        )
    return value
