"""Averaging followed by an optimiser on the server, which takes the mean delta for a gradient."""

from collections.abc import Callable

import torch

from strategies.recipe import Facts, Recipe, in_range
from strategies.reducers import weighted_mean
from strategies.server_steps import ServerStep, adaptive, chain, momentum

_HSU = "Hsu et al. 2019, arXiv 1909.06335"
_REDDI = "Reddi et al. 2020, arXiv 2003.00295"
_BELOW_1 = 0.999999
_NOTE = "On LoRA, the server's optimiser works on the factors A and B, not on their products."


def fed_avg_m(
    *,
    server_learning_rate: float = 0.3,
    momentum_beta: float = 0.9,
    nesterov: bool = False,
    weight_by: str = "tokens",
) -> Recipe:
    """Return FedAvgM, momentum on the server: `v <- beta v + delta; x <- x + eta v`.

    Args:
        server_learning_rate: eta. A direction that all rounds agree on is taken `eta / (1 - beta)` times over; 1, which
            leaves the deltas to the clients' rate as the paper does, overshoots where those are AdamW's.
        momentum_beta: beta, 0 to under 1; 0 is federated averaging, with eta as its rate.
        nesterov: Look ahead: `x <- x + eta (delta + beta v)`.
        weight_by: `tokens`, `rows` or `equal`.

    Raises:
        ConfigError: If eta or beta is out of range.

    Source: Hsu et al. 2019, arXiv 1909.06335, section 4.3.
    Departures: the sign (deltas are added, the paper subtracts); eta, which the paper has only in the clients' rate;
        weights as in `fed_avg`.
    """
    rate = in_range("fed_avg_m", "server_learning_rate", server_learning_rate, 0)
    beta = in_range("fed_avg_m", "momentum_beta", momentum_beta, 0, _BELOW_1)
    return _recipe("fed_avg_m", momentum(rate, beta, nesterov=nesterov), weight_by, _HSU)


def fed_adagrad(
    *, server_learning_rate: float = 0.03, beta1: float = 0.0, tau: float = 0.001, weight_by: str = "tokens"
) -> Recipe:
    """Return FedAdagrad: `m <- beta1 m + (1 - beta1) d; v <- v + d^2; x <- x + eta m / (sqrt(v) + tau)`.

    Args:
        server_learning_rate: eta; see `fed_adam`. Steps shrink with the square root of the rounds.
        beta1: How much of m is kept, 0 to under 1; the paper's experiments have 0.
        tau: Adaptivity, in units of a delta's entries; see `fed_adam`.
        weight_by: `tokens`, `rows` or `equal`.

    Raises:
        ConfigError: If a number is out of range.

    Source: Reddi et al. 2020, arXiv 2003.00295, algorithm 2.
    Departures: as `fed_adam`'s.
    """
    return _adaptive("fed_adagrad", torch.add, server_learning_rate, beta1, tau, weight_by)


def fed_adam(
    *,
    server_learning_rate: float = 0.03,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 0.001,
    weight_by: str = "tokens",
) -> Recipe:
    """Return FedAdam: `m <- beta1 m + (1 - beta1) d; v <- beta2 v + (1 - beta2) d^2; x <- x + eta m / (sqrt(v) + tau)`.

    Args:
        server_learning_rate: eta, about how far an entry moves in a round. Deltas of AdamW clients have entries up to
            their learning rate times their steps (0.03 for 0.003 and 10).
        beta1: How much of m is kept, 0 to under 1.
        beta2: How much of v is kept, 0 to under 1.
        tau: Adaptivity, in units of a delta's entries: those far below it are not scaled up.
        weight_by: `tokens`, `rows` or `equal`.

    Raises:
        ConfigError: If a number is out of range.

    Source: Reddi et al. 2020, arXiv 2003.00295, algorithm 2.
    Departures: weights as in `fed_avg`, where the algorithm has a plain mean. v begins at tau^2, the least that the
        algorithm allows. There is no bias correction, as in the paper (Flower's FedAdam adds one).
    """
    beta = in_range("fed_adam", "beta2", beta2, 0, _BELOW_1)

    def average(second: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        return beta * second + (1 - beta) * square

    return _adaptive("fed_adam", average, server_learning_rate, beta1, tau, weight_by)


def fed_yogi(
    *,
    server_learning_rate: float = 0.03,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 0.001,
    weight_by: str = "tokens",
) -> Recipe:
    """Return FedYogi: FedAdam with `v <- v - (1 - beta2) d^2 sign(v - d^2)`, which falls slowly after a large delta.

    Args:
        server_learning_rate: eta; see `fed_adam`.
        beta1: How much of m is kept, 0 to under 1.
        beta2: 1 less the share of `d^2` that v moves by, 0 to under 1.
        tau: Adaptivity, in units of a delta's entries; see `fed_adam`.
        weight_by: `tokens`, `rows` or `equal`.

    Raises:
        ConfigError: If a number is out of range.

    Source: Reddi et al. 2020, arXiv 2003.00295, algorithm 2.
    Departures: as `fed_adam`'s.
    """
    beta = in_range("fed_yogi", "beta2", beta2, 0, _BELOW_1)

    def towards(second: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        return second - (1 - beta) * square * torch.sign(second - square)

    return _adaptive("fed_yogi", towards, server_learning_rate, beta1, tau, weight_by)


def _adaptive(
    name: str,
    second_moment: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    rate: float,
    beta1: float,
    tau: float,
    weight_by: str,
) -> Recipe:
    step = adaptive(
        second_moment,
        learning_rate=in_range(name, "server_learning_rate", rate, 0),
        beta1=in_range(name, "beta1", beta1, 0, _BELOW_1),
        tau=in_range(name, "tau", tau, 1e-12),  # squared, still a normal fp32 number
    )
    return _recipe(name, step, weight_by, _REDDI)


def _recipe(name: str, step: ServerStep, weight_by: str, source: str) -> Recipe:
    facts = Facts("general", source, linear=True, of_mean=True, note=_NOTE)
    return Recipe(name, weighted_mean(), chain(step), weight_by=weight_by, facts=facts)
