"""Rules that withstand hostile clients by looking at distances, sizes or directions of whole updates.

A rule says who counts, with what weight and at what scale; another one then does the averaging (`then`). Weights that
clients report for themselves are no part of it unless asked for.
"""

from dataclasses import replace
from functools import partial
from statistics import median_low

import torch

from fedpeat.core import ClientUpdate, ConfigError, EngineError, nearest
from strategies.gram import MEASURES, curves, gram, scale_to, squared_distances
from strategies.order_statistics import by_coordinate, central
from strategies.recipe import Facts, Recipe, in_range
from strategies.reducers import Situation, Step, check_weight, gathering
from strategies.selection import best, krum_scores, repeated_krum, trust, weiszfeld
from strategies.weighing import SERVER, Updates, own_weight, prepared, reweighted, robust_recipe, scaled


def krum(*, byzantine: int = 1, measure: str = "both") -> Recipe:
    """Return Krum: the step is the update of the one client that lies closest to its `n - f - 2` nearest neighbours.

    Args:
        byzantine: f, how many hostile clients a round may have; it needs `n >= 2 f + 3` updates.
        measure: What distances are of: `products` of LoRA layers, `factors`, or `both`.

    Raises:
        ConfigError: If an argument is out of range.

    Source: Blanchard et al. 2017, NeurIPS, arXiv 1703.02757, section 4 (the Krum function).
    Departures: of clients' changes over a round, not gradients. On LoRA, distances are those of the products' changes
        beside those of the factors' (`gram`). Of equals, the first by name. Weights play no part.
    """
    _check("krum", byzantine, measure)

    def weigh(situation: Situation, updates: Updates) -> list[float]:
        (chosen,) = best(_scores("krum", situation, updates, byzantine, measure), 1)
        return [float(index == chosen) for index in range(len(updates))]

    facts = _facts(
        "Blanchard et al. 2017, arXiv 1703.02757",
        "Withstands up to `byzantine` clients whose changes lie away from the others' (flipped signs, boosts, noise), "
        "in league or not; learns from one client a round.",
    )
    return robust_recipe("krum", partial(reweighted, weigh), facts)


def multi_krum(*, byzantine: int = 1, then: str = "fed_avg", measure: str = "both", weight_by: str = "equal") -> Recipe:
    """Return Multi-Krum: the mean over the `n - f` clients with the best of Krum's scores.

    Args:
        byzantine: f, how many hostile clients a round may have; it needs `n >= 2 f + 3` updates.
        then: How the chosen are averaged: `fed_avg`, `fed_ex_lora`, `flora` or `flex_lora`.
        measure: As in `krum`.
        weight_by: `equal`; or `tokens` or `rows`, which takes the chosen clients' word for their weights.

    Raises:
        ConfigError: If an argument is out of range.

    Source: Blanchard et al. 2017, NeurIPS, arXiv 1703.02757, the variant Multi-Krum.
    Departures: as in `krum`. The paper leaves the number of the chosen open; `n - f` keeps all honest clients of a
        round with `f` hostile ones that are found out.
    """
    _check("multi_krum", byzantine, measure)

    def weigh(situation: Situation, updates: Updates) -> list[float]:
        scores = _scores("multi_krum", situation, updates, byzantine, measure)
        chosen = set(best(scores, len(updates) - byzantine))
        return [own_weight(update, weight_by) if index in chosen else 0.0 for index, update in enumerate(updates)]

    facts = _facts(
        "Blanchard et al. 2017, arXiv 1703.02757",
        "Withstands up to `byzantine` clients whose changes lie away from the others' (flipped signs, boosts, noise), "
        "but not a small common shift within the honest spread.",
    )
    return robust_recipe("multi_krum", partial(reweighted, weigh), facts, then, weight_by)


def bulyan(*, byzantine: int = 1, measure: str = "both") -> Recipe:
    """Return Bulyan: `theta = n - 2 f` clients by repeated Krum, then the mean of the `theta - 2 f` central values.

    The second half acts coordinate by coordinate on what travels (on LoRA, the factors): of the chosen clients' values,
    those closest to their median are averaged.

    Args:
        byzantine: f, how many hostile clients a round may have; it needs `n >= 4 f + 3` updates.
        measure: As in `krum`.

    Raises:
        ConfigError: If an argument is out of range.

    Source: El Mhamdi et al. 2018, ICML, arXiv 1802.07927, the rule Bulyan over Krum.
    Departures: as in `krum`. Each of the repeated choices is made among the `m` that are left, by their `m - f - 2`
        nearest neighbours, at least one: towards the end fewer are left than Krum itself asks for.
    """
    _check("bulyan", byzantine, measure)

    def finish(situation: Situation, updates: Updates) -> Step:
        count = len(updates)
        _check_count("bulyan", byzantine, 4 * byzantine + 3, count)
        squared = squared_distances(gram(situation, updates, measure))
        chosen = repeated_krum(squared, byzantine, count - 2 * byzantine)
        return Step(by_coordinate([updates[index] for index in chosen], central(count - 4 * byzantine)))

    facts = _facts(
        "El Mhamdi et al. 2018, arXiv 1802.07927",
        "Withstands what Krum does and a large change in few coordinates too, which is lost in the distances.",
    )
    return Recipe("bulyan", gathering(finish), weight_by="equal", facts=facts)


def geometric_median(
    *,
    iterations: int = 100,
    smoothing: float = 1e-6,
    then: str = "fed_avg",
    measure: str = "both",
    weight_by: str = "equal",
) -> Recipe:
    """Return RFA: the mean whose weights make it the geometric median, `argmin_z sum_k p_k |z - x_k|`.

    Args:
        iterations: Of Weiszfeld's algorithm; the clients' inner products are all it looks at.
        smoothing: nu, the distance below which clients do not gain in weight any more, in median distances.
        then: How clients are averaged: `fed_avg`, `fed_ex_lora`, `flora` or `flex_lora`.
        measure: As in `krum`.
        weight_by: p_k: `equal`; or `tokens` or `rows`, which takes clients' word for their weights.

    Raises:
        ConfigError: If an argument is out of range.

    Source: Pillutla et al. 2019, arXiv 1912.13445, the smoothed Weiszfeld algorithm.
    Departures: on LoRA, the median of the products' changes beside the factors' (`gram`), found as weights, which the
        reducer then applies. More iterations, as none needs the clients. They start at the half of the clients that lie
        closest to others, not at the mean, from which a far outlier takes hundreds of them. nu is relative to the
        round's median distance, which an outlier cannot move.
    """
    _whole("geometric_median", "iterations", iterations, 1)
    in_range("geometric_median", "smoothing", smoothing, 0, 1)
    _check("geometric_median", 0, measure)

    def weigh(situation: Situation, updates: Updates) -> list[float]:
        weights = [own_weight(update, weight_by) for update in updates]
        check_weight(sum(weights), len(weights))
        shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        return weiszfeld(gram(situation, updates, measure), shares, iterations, smoothing).tolist()

    facts = _facts(
        "Pillutla et al. 2019, arXiv 1912.13445",
        "Withstands any updates of clients with less than half of the weight, without being told how many they are.",
    )
    return robust_recipe("geometric_median", partial(reweighted, weigh), facts, then, weight_by)


def norm_clipping(
    *, norm: float | None = None, factor_ratio: float = 2.0, then: str = "fed_avg", weight_by: str = "equal"
) -> Recipe:
    """Return norm clipping: changes larger than a bound are scaled down to it, then averaged.

    On LoRA the size is that of the products' changes. They are not linear in the factors' changes: the scale `c` that
    all of a client's tensors are given is the smallest with `|s (B + c dB) (A + c dA) - s B A| = norm`, taken over all
    layers and other tensors.

    Args:
        norm: Largest norm of a client's change; null: the median of the round's (of an even number, the smaller one).
        factor_ratio: Largest norm of a client's change of LoRA factors, in medians of the round's: products alone do
            not tell `c B` and `A / c` from B and A.
        then: How clients are averaged: `fed_avg`, `fed_ex_lora`, `flora` or `flex_lora`.
        weight_by: `equal`; or `tokens` or `rows`, which takes clients' word for their weights.

    Raises:
        ConfigError: If an argument is out of range.

    Source: Sun et al. 2019, arXiv 1911.07963, the defence by norm thresholding.
    Departures: on LoRA, the two norms above. No noise is added. The median as a bound is ours.
    """
    in_range("norm_clipping", "norm", 1 if norm is None else norm, 1e-30)
    in_range("norm_clipping", "factor_ratio", factor_ratio, 1e-30)

    def prepare(situation: Situation, updates: Updates) -> list[ClientUpdate]:
        sizes = [curves(situation, update) for update in updates]
        wholes = [size.products + size.others for size in sizes]
        bound = median_low([whole.norm() for whole in wholes]) if norm is None else norm
        factor_bound = factor_ratio * median_low([size.factors.norm() for size in sizes])
        return [
            replace(
                scaled(update, min(scale_to(whole, bound), scale_to(size.factors, factor_bound))),
                weight=own_weight(update, weight_by),
            )
            for update, whole, size in zip(updates, wholes, sizes, strict=True)
        ]

    facts = _facts(
        "Sun et al. 2019, arXiv 1911.07963",
        "Withstands a few boosted updates (model replacement), but not many hostile clients that agree.",
    )
    return robust_recipe("norm_clipping", partial(prepared, prepare), facts, then, weight_by)


def fl_trust(*, then: str = "fed_avg", measure: str = "both") -> Recipe:
    """Return FLTrust: clients count by how much their change points where the server's own does, at the server's size.

    `t_k = max(0, cos(x_k, x_0))`; the step is `sum_k t_k (|x_0| / |x_k|) x_k / sum_k t_k`, where `x_0` is the server's
    update, which is not in the mean itself. If nobody is trusted, the state stays.

    Args:
        then: How clients are averaged: `fed_avg`, `fed_ex_lora`, `flora` or `flex_lora`.
        measure: What is compared on LoRA: `products`, `factors`, or `both`, as one vector of two parts in each of which
            the server's has length 1.

    Raises:
        ConfigError: If an argument is out of range.

    Source: Cao et al. 2021, NDSS, arXiv 2012.13995, section IV.
    Departures: on LoRA, directions and sizes as in `measure`; a client's factors are scaled so that its change gets the
        server's size, which is not in proportion (`norm_clipping`). Weights that clients report play no part.
    """
    _check("fl_trust", 0, measure)

    def prepare(situation: Situation, updates: Updates) -> list[ClientUpdate]:
        place = [index for index, update in enumerate(updates) if update.client == SERVER]
        if not place:
            raise EngineError(
                "strategy=fl_trust measures clients by the server's own update",
                "the server sent none",
                "set server.train=emulator (it needs data of its own: data.server_share)",
            )
        return [
            replace(scaled(update, scale), weight=cosine)
            for update, (cosine, scale) in zip(updates, trust(situation, updates, place[0], measure), strict=True)
            if cosine > 0 and update.client != SERVER
        ]

    facts = _facts(
        "Cao et al. 2021, arXiv 2012.13995",
        "Withstands even a majority of hostile clients (flipped signs, boosts, noise), as far as the server's own data "
        "speaks for the honest ones'.",
        server_takes_part="needed",
    )
    return robust_recipe("fl_trust", partial(prepared, prepare), facts, then)


def _facts(source: str, note: str, server_takes_part: str = "yes") -> Facts:
    return Facts("robust", source, "robust", server_takes_part=server_takes_part, note=note)


def _scores(strategy: str, situation: Situation, updates: Updates, byzantine: int, measure: str) -> torch.Tensor:
    _check_count(strategy, byzantine, 2 * byzantine + 3, len(updates))
    return krum_scores(squared_distances(gram(situation, updates, measure)), byzantine)


def _check_count(strategy: str, byzantine: int, least: int, came: int) -> None:
    if came < least:
        raise EngineError(
            f"strategy={strategy} with byzantine={byzantine} needs {least} updates a round",
            f"{came} came",
            "let more clients take part (clients.per_round, server.train), or lower strategy.byzantine",
        )


def _check(strategy: str, byzantine: int, measure: str) -> None:
    _whole(strategy, "byzantine", byzantine, 0)
    if measure not in MEASURES:
        remedy = nearest(str(measure), MEASURES)
        raise ConfigError(f"cannot use strategy.measure={measure} with strategy={strategy}", "no such measure", remedy)


def _whole(strategy: str, key: str, value: int, least: int) -> None:
    in_range(strategy, key, value, least)
    if not isinstance(value, int):
        asked = f"cannot use strategy.{key}={value} with strategy={strategy}"
        raise ConfigError(asked, "it must be a whole number", f"change strategy.{key}")
