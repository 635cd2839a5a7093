"""Means of whatever travels, without a memory."""

import math
from dataclasses import dataclass, field

from fedpeat.core import ClientUpdate, EngineError, norm
from strategies.recipe import Facts, Recipe, every_round, in_range
from strategies.reducers import Reducer, Situation, Step, WeightedSum, check_weight, weighted_mean
from strategies.server_steps import chain, scale

_LEAST_LOSS = 1e-10


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
    facts = Facts("general", "McMahan et al. 2017, arXiv 1602.05629", linear=True, of_mean=True)
    return Recipe("fed_avg", weighted_mean(), step, weight_by=weight_by, facts=facts)


def fed_prox(*, proximal_mu: float = 0.01, weight_by: str = "tokens") -> Recipe:
    """Return FedProx: clients minimise `loss + mu / 2 * |y - x|^2`; the server averages.

    Args:
        proximal_mu: mu, the pull towards the round's start; 0 is federated averaging.
        weight_by: `tokens`, `rows` or `equal`.

    Raises:
        ConfigError: If mu is negative.

    Source: Li et al. 2020, arXiv 1812.06127, algorithm 2.
    Departures: weights and local steps as in `fed_avg`; no gamma-inexactness is checked.
    """
    half = every_round(proximal_mu=in_range("fed_prox", "proximal_mu", proximal_mu, 0))
    facts = Facts("general", "Li et al. 2020, arXiv 1812.06127", linear=True, of_mean=True)
    return Recipe("fed_prox", weighted_mean(), weight_by=weight_by, client=half, facts=facts)


def q_fed_avg(*, q: float = 1.0, lipschitz: float = 0.1, probe_rows: int = 64, weight_by: str = "equal") -> Recipe:
    """Return q-FedAvg: clients that the global state serves badly (loss F_k) count for more.

        x <- x + sum_k F_k^q L (y_k - x) / sum_k h_k,    h_k = q F_k^(q-1) |L (y_k - x)|^2 + L F_k^q

    Clients score `probe_rows` of their own rows before they train, as `start_loss`: F_k.

    Args:
        q: How much a high loss counts; 0 is the plain mean. 0 to 20.
        lipschitz: L, the inverse of how far a client moves per unit of gradient. A step is the mean, weighted by F^q,
            over about `1 + q L |y - x|^2 / F`. The paper has 1 / (the clients' learning rate), which fits plain SGD;
            AdamW moves much further (3 to 10 per unit, as measured on LoRA in small models), and with that L would all
            but stop.
        probe_rows: Rows scored, 1 or more; a client that has fewer scores all.
        weight_by: `tokens`, `rows` or `equal`.

    Raises:
        ConfigError: If a number is out of range.

    Source: Li et al. 2019, arXiv 1905.10497, algorithm 2.
    Departures: F_k is over `probe_rows` rows, not all. `weight_by` other than `equal` multiplies both sums; the paper
        samples clients by their data instead. A loss of 0 counts as 1e-10 (the authors' code adds as much).
    """

    def add(folded: _Fair, update: ClientUpdate) -> _Fair:
        loss = _start_loss(update)
        folded.deltas.add(update.delta, update.weight * loss**q)
        bend = q * loss ** (q - 1) * lipschitz * norm(update.delta) ** 2
        folded.damping += update.weight * (bend + loss**q)
        folded.weight += update.weight
        return folded

    in_range("q_fed_avg", "q", q, 0, 20)
    in_range("q_fed_avg", "lipschitz", lipschitz, 1e-12)
    half = every_round(probe_rows=int(in_range("q_fed_avg", "probe_rows", probe_rows, 1)))
    facts = Facts("general", "Li et al. 2019, arXiv 1905.10497", note="Aims at equal losses rather than a low mean.")
    return Recipe("q_fed_avg", Reducer(_Fair, add, _fair_step), weight_by=weight_by, client=half, facts=facts)


@dataclass
class _Fair:
    """Sums over clients of `w F^q delta` and of `w h / L`."""

    situation: Situation
    deltas: WeightedSum = field(default_factory=WeightedSum)
    damping: float = 0.0
    weight: float = 0.0


def _fair_step(folded: _Fair) -> Step:
    check_weight(folded.weight, folded.deltas.count)
    return Step({name: (total / folded.damping).float() for name, total in folded.deltas.sums.items()})


def _start_loss(update: ClientUpdate) -> float:
    loss = update.metrics.get("start_loss")
    if loss is None or not math.isfinite(loss) or loss < 0:
        raise EngineError(
            f"q_fed_avg needs the metric start_loss of {update.client!r}, 0 or more",
            f"found {loss}",
            "run the same version on both ends, or choose strategy=fed_avg",
        )
    return max(loss, _LEAST_LOSS)
