"""Client-level differential privacy: what clients send is clipped, and noise is added to their sum."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedpeat.core import ClientUpdate, ConfigError, Tensors, norm
from strategies.noise import bits_of, normal
from strategies.recipe import Recipe
from strategies.reducers import Reducer, Situation, Step, WeightedSum
from strategies.traffic import tensors_up

PLACES = ("server", "client")
CLIP_NORM = "clip_norm"
"""The bound in what the server remembers, in what it sends to clients that clip, and among a round's metrics."""


@dataclass(frozen=True)
class Clipping:
    """The largest norm of a client's delta, and who sees to it.

    Attributes:
        norm: C: of all tensors that a client sends, taken as one vector; the first round's, if it adapts.
        on: `server`, or `client`: clients clip before they send; the server does it again.
        quantile: gamma, the share of clients whose norm lies below C, which C moves to; 0: C stays.
        learning_rate: eta_C, how fast: C changes by `exp(-eta_C (share below - gamma))` a round.
        bit_noise: sigma_b, standard deviation of the noise on the count of clients below C.
    """

    norm: float
    on: str = "server"
    quantile: float = 0.0
    learning_rate: float = 0.2
    bit_noise: float = 0.0

    def __post_init__(self) -> None:
        """Check all of it.

        Raises:
            ConfigError: If a value is out of range.
        """
        if self.on not in PLACES:
            raise ConfigError(f"privacy.clip_on={self.on}", "no such place", "choose server or client")
        for key, value, fits, must in (
            ("clip_norm", self.norm, 0 < self.norm < math.inf, "be above 0"),
            ("adaptive.quantile", self.quantile, 0 <= self.quantile < 1, "be 0, or between 0 and 1"),
            ("adaptive.learning_rate", self.learning_rate, 0 < self.learning_rate <= 10, "be above 0, at most 10"),
            ("adaptive.bit_noise", self.bit_noise, 0 <= self.bit_noise < math.inf, "be 0 or more"),
        ):
            if not fits:
                raise ConfigError(f"cannot use privacy.{key}={value}", f"it must {must}", f"change privacy.{key}")


def why_not_private(recipe: Recipe) -> str:
    """Return why noise on the sum of the deltas does not make a recipe's step private, or not useful; "" if it does."""
    half = recipe.client(1)
    if half.get("personal"):
        return "its clients keep tensors of their own, which no noise is added to"
    if half.get("control_variates"):
        return "its clients send control variates beside their deltas, which would have to be clipped and noised too"
    if recipe.facts.family == "robust":
        return "it looks at the clients' updates one by one and weighs them by each other, which no bound on one covers"
    if not recipe.facts.of_mean:
        return "its step needs more of each client than one plain mean of the deltas tells"
    return ""


def private(
    recipe: Recipe,
    *,
    noise_multiplier: float,
    clipping: Clipping,
    expected: float,
    noise_seed: int | None = None,
) -> Recipe:
    """Return the recipe, run on a noisy sum of clipped deltas: `d = (sum_k clip(d_k, C) + N(0, (z C)^2)) / m`.

    The rule gets `d` for the mean of the deltas; what it does with it (momentum, Adam, a decomposition) is
    post-processing. Clients weigh 1 each, whatever they claim. m is the number expected, not the one that replied: who
    did not reply adds a zero, so that a client more or less changes the sum by C at most, and nothing else. Noise is on
    all tensors that clients are to send, also in a round in which nobody took part.

    With `clipping.quantile` C follows the clients' norms. Published of these is the count of `b_k - 1/2`, `b_k` being 1
    where the norm is at most C, else 0, with noise of `bit_noise`; `C <- C exp(-eta_C (count / m + 1/2 - gamma))`.

    With `clipping.on == "client"` clients are sent C and clip before they encode. The server clips again: a client's
    word is no bound, and neither is what a codec made of a bounded vector. `b_k` is then the client's word, of which
    the sum needs no more than that it is 0 or 1.

    Args:
        recipe: A rule whose step follows from the mean of the deltas alone.
        noise_multiplier: z, of the deltas alone (`fedpeat.privacy.delta_noise` where C adapts); 0 for none.
        clipping: C, and how it moves.
        expected: m, the clients of a round, on average.
        noise_seed: What the noise follows from; None: from the operating system, never the same again.

    Raises:
        ConfigError: If the recipe needs more than the mean of the deltas.

    Source: McMahan et al. 2018, arXiv 1710.06963, algorithm 1 (DP-FedAvg; the estimator with a fixed denominator and
        flat clipping); Andrew et al. 2021, arXiv 1905.03871, algorithm 1 (adaptive clipping).
    Departures: all weights are 1. Bits are counted less 1/2 each, in the algorithm as in its proof, so that the count
        divides by m as well. Server steps are the recipe's own, where Andrew et al. have momentum.
    """
    reason = why_not_private(recipe)
    if reason:
        raise ConfigError(
            f"privacy=client_level does not go with strategy={recipe.name}",
            reason,
            "choose a strategy of a plain mean (fed_avg, fed_prox, fed_avg_m, fed_adam, ffa_lora, fed_sb, ...), or"
            " privacy=none",
        )

    def start(situation: Situation) -> _Clipped:
        return _Clipped(situation, recipe.reduce.start(situation), _bound(situation, clipping))

    def add(total: _Clipped, update: ClientUpdate) -> _Clipped:
        total.add(update, told=clipping.on == "client")
        return total

    def finish(total: _Clipped) -> Step:
        bits = bits_of(noise_seed, total.situation.round)
        like = tensors_up(total.situation.state.tensors, total.situation.layout, _half(recipe, total.situation), None)
        delta: dict[str, torch.Tensor] = {}
        for name in sorted(like):
            noise = normal(bits, tuple(like[name].shape)) * (noise_multiplier * total.bound)
            delta[name] = ((noise + total.deltas.sums.get(name, 0.0)) / expected).float()
        below = (total.centred + clipping.bit_noise * float(normal(bits, (1,)))) / expected + 0.5
        mean = ClientUpdate("all", total.situation.round, delta, 1.0)
        step = recipe.reduce.finish(recipe.reduce.add(total.folded, mean))
        return replace(
            step,
            memory={**step.memory, **_next_bound(total.bound, below, clipping)},
            metrics={**step.metrics, **total.metrics()},
        )

    def client(server_round: int) -> Mapping[str, Any]:
        return {**recipe.client(server_round), "clip_delta": True}

    def sends(situation: Situation) -> Tensors:
        bound = torch.tensor([_bound(situation, clipping)], dtype=torch.float32)
        return {**recipe.sends(situation), CLIP_NORM: bound}

    there = {"client": client, "sends": sends} if clipping.on == "client" else {}
    return replace(recipe, reduce=Reducer(start, add, finish), weight_by="equal", always=True, **there)


def _half(recipe: Recipe, situation: Situation) -> Mapping[str, Any]:
    return recipe.client(situation.round)


def _bound(situation: Situation, clipping: Clipping) -> float:
    known = situation.state.memory.get(CLIP_NORM)
    return clipping.norm if known is None else float(known)


def _next_bound(bound: float, below: float, clipping: Clipping) -> dict[str, torch.Tensor]:
    if not clipping.quantile:
        return {}
    after = bound * math.exp(-clipping.learning_rate * (below - clipping.quantile))
    return {CLIP_NORM: torch.tensor(after, dtype=torch.float64)}


class _Clipped:
    """A round's sum of clipped deltas; changed in place."""

    def __init__(self, situation: Situation, folded: Any, bound: float) -> None:
        self.situation, self.folded, self.bound = situation, folded, bound
        self.deltas = WeightedSum()
        self.centred = 0.0
        self.clipped = self.count = 0

    def add(self, update: ClientUpdate, *, told: bool) -> None:
        """Add an update; with `told`, whether it was clipped is what its client says."""
        size = norm(update.delta)
        if not math.isfinite(size):
            return  # as if it had not come
        self.deltas.add(update.delta, 1.0 if size <= self.bound else self.bound / size)
        clipped = update.metrics.get("clipped", 0.0) != 0 if told else size > self.bound
        self.centred += -0.5 if clipped else 0.5
        self.clipped += clipped
        self.count += 1

    def metrics(self) -> dict[str, float]:
        """Return the bound, and the exact share of clients that it cut, which is for the server's eyes alone."""
        share = {"clipped_share": self.clipped / self.count} if self.count else {}
        return {CLIP_NORM: self.bound, **share}
