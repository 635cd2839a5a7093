"""Means that mend what unlike data or unlike work does to local training."""

from dataclasses import dataclass, field

import torch

from fedpeat.core import ClientUpdate, EngineError, Tensors, shorten
from strategies.recipe import Facts, Recipe, every_round, in_range
from strategies.reducers import Reducer, Situation, Step, WeightedSum, check_weight
from strategies.server_steps import chain, scale

SERVER = "server"


def scaffold(*, server_learning_rate: float = 1.0, weight_by: str = "equal") -> Recipe:
    """Return SCAFFOLD: clients step along `g - c_k + c`, where c_k and c estimate the client's and the mean gradient.

    The server sends c, under the travelling tensors' names; clients keep c_k and send `c_k+ - c_k` beside the delta:

        x <- x + eta sum_k p_k (y_k - x)
        c <- c + (1 / N) sum_k (c_k+ - c_k)            over the round's clients, of N in all

    Args:
        server_learning_rate: eta.
        weight_by: `tokens`, `rows` or `equal`.

    Raises:
        ConfigError: If eta is negative.

    Source: Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1, equations 4 and 5.
    Departures: c_k+ is the mean of the client's own gradients (before `- c_k + c`) along its local path. For plain SGD
        this is the paper's option II, `c_k - c + (x - y_k) / (K lr)`, and it is defined for any other optimiser too,
        where option II would take the optimiser's scale for the gradient's. The server, where it trains too, counts in
        the mean of the deltas but has no c_k. On LoRA, gradients are those of the factors A and B.
    """
    rate = in_range("scaffold", "server_learning_rate", server_learning_rate, 0)
    facts = Facts(
        "general",
        "Karimireddy et al. 2020, arXiv 1910.06378",
        client_state="control variate",
        linear=True,
        note="Twice the traffic in both directions: variates go beside the tensors.",
    )
    return Recipe(
        "scaffold",
        Reducer(start=_Variates, add=_with_variate, finish=_scaffold_step),
        chain() if rate == 1 else chain(scale(rate)),
        weight_by=weight_by,
        client=every_round(control_variates=True),
        sends=_variates,
        facts=facts,
    )


def _variates(situation: Situation) -> dict[str, torch.Tensor]:
    """Return c for every travelling tensor; zeros before the first change."""
    memory, tensors = situation.state.memory, situation.state.tensors
    return {name: memory[name] if name in memory else torch.zeros_like(tensors[name]) for name in tensors}


@dataclass
class _Variates:
    situation: Situation
    deltas: WeightedSum = field(default_factory=WeightedSum)
    changes: WeightedSum = field(default_factory=WeightedSum)


def _with_variate(folded: _Variates, update: ClientUpdate) -> _Variates:
    _check_variate(update, folded.situation.state.tensors)
    folded.deltas.add(update.delta, update.weight)
    folded.changes.add(update.extras, 1.0)
    return folded


def _check_variate(update: ClientUpdate, tensors: Tensors) -> None:
    wrong = sorted(set(update.delta) ^ set(update.extras))
    wrong += sorted(name for name, extra in update.extras.items() if extra.shape != tensors[name].shape)
    if wrong and (update.extras or update.client != SERVER):
        raise EngineError(
            f"scaffold needs the change of a control variate for each tensor that {update.client!r} sent",
            f"missing, unknown or mis-shaped: {shorten(wrong, 3)}",
            "run the same version on both ends, or choose strategy=fed_avg",
        )


def _scaffold_step(folded: _Variates) -> Step:
    memory = _variates(folded.situation)
    for name, change in folded.changes.sums.items():
        memory[name] = (memory[name].double() + change / folded.situation.population).float()
    return Step(folded.deltas.mean(), memory=memory)


def fed_nova(*, weight_by: str = "rows") -> Recipe:
    """Return FedNova: deltas are divided by the local work in them before they are averaged.

        d_k = (y_k - x) / a_k,    x <- x + tau_eff sum_k p_k d_k,    tau_eff = sum_k p_k a_k

    `a_k` is the client's metric `effective_steps`, the sum of the weights that its delta gives to its gradients: the
    number of steps, and with SGD's momentum more. Where all do the same work this is federated averaging.

    Args:
        weight_by: `tokens`, `rows` or `equal`. By `tokens`, work would count twice: in p_k and in a_k.

    Source: Wang et al. 2020, arXiv 2007.07481, equations 6 and 7.
    Departures: tau_eff takes a_k where the paper's default has the number of steps, which is the same without momentum;
        so with it too, equal work gives federated averaging. For optimisers other than SGD, whose deltas are no sum of
        gradients, a_k is the number of steps.
    """
    facts = Facts(
        "general",
        "Wang et al. 2020, arXiv 2007.07481",
        linear=True,
        note="Matters where devices take different numbers of local steps.",
    )
    return Recipe("fed_nova", Reducer(_Work, _with_work, _nova_step), weight_by=weight_by, facts=facts)


@dataclass
class _Work:
    situation: Situation
    directions: WeightedSum = field(default_factory=WeightedSum)
    weight: float = 0.0
    steps: float = 0.0


def _with_work(folded: _Work, update: ClientUpdate) -> _Work:
    steps = update.metrics.get("effective_steps")
    if steps is None or not 0 < steps < float("inf"):
        raise EngineError(
            f"fed_nova needs the metric effective_steps of {update.client!r}, more than 0",
            f"found {steps}",
            "run the same version on both ends, or choose strategy=fed_avg",
        )
    folded.directions.add(update.delta, update.weight / steps)
    folded.weight += update.weight
    folded.steps += update.weight * steps
    return folded


def _nova_step(folded: _Work) -> Step:
    check_weight(folded.weight, folded.directions.count)
    effective = folded.steps / folded.weight
    sums = folded.directions.sums
    return Step({name: (total * (effective / folded.weight)).float() for name, total in sums.items()})
