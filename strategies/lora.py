"""Rules for LoRA that choose which factors train and travel, and one that mends the mean of the factors."""

from collections.abc import Callable

import torch

from fedpeat.core import ConfigError, Layout, Tensors
from strategies.exactness import plain_product, with_products
from strategies.recipe import Facts, Recipe, every_round, in_range
from strategies.reducers import Reducer, Situation, Step, weighted_mean


def check_factors(strategy: str, layout: Layout) -> None:
    """Check that the travelling tensors are factors of LoRA layers.

    Raises:
        ConfigError: If there are no LoRA layers, or they have square cores.
    """
    if not layout.pairs:
        raise ConfigError(f"strategy={strategy} works on LoRA's factors", "no LoRA layer travels", "use peft=lora")
    if any(pair.r for pair in layout.pairs):
        raise ConfigError(
            f"strategy={strategy} works on LoRA's factors",
            "only the square cores between them travel",
            "use peft=lora, or strategy=fed_sb",
        )


def check_cores(strategy: str, layout: Layout) -> None:
    """Check that the travelling tensors are square cores of LoRA layers.

    Raises:
        ConfigError: If there are no LoRA layers, or one has no core.
    """
    if not layout.pairs or any(pair.r is None for pair in layout.pairs):
        found = "LoRA layers travel without one" if layout.pairs else "no LoRA layer travels"
        raise ConfigError(f"strategy={strategy} averages square cores", found, "use peft=lora_sb")


def checked(strategy: str, reducer: Reducer, check: Callable[[str, Layout], None] = check_factors) -> Reducer:
    """Return `reducer`, made to refuse at the start what `check` refuses."""

    def start(situation: Situation) -> object:
        check(strategy, situation.layout)
        return reducer.start(situation)

    return reducer._replace(start=start)


def ffa_lora(*, weight_by: str = "tokens") -> Recipe:
    """Return FFA-LoRA: A stays what it was at its random start; `B <- sum_k p_k B_k`.

    `sum_k p_k s B_k A = s (sum_k p_k B_k) A`: the mean of the factors is the mean of the products, at half the traffic.

    Args:
        weight_by: `tokens`, `rows` or `equal`.

    Source: Sun et al. 2024, arXiv 2403.12313, the method FFA-LoRA.
    Departures: weights as in `fed_avg`; the paper's equal ones are `weight_by=equal`. No differential privacy.
    """
    half = every_round(train_only=["B", "other"], fixed=["A"])
    facts = Facts("lora", "Sun et al. 2024, arXiv 2403.12313", "yes", linear=True, of_mean=True, needs="pairs")
    return Recipe("ffa_lora", checked("ffa_lora", weighted_mean()), weight_by=weight_by, client=half, facts=facts)


def ro_lora(*, weight_by: str = "tokens") -> Recipe:
    """Return RoLoRA: odd rounds train, send and average B, even rounds A.

    One factor is everybody's in each round, so that the mean of the other is the mean of the products. B comes first:
    at LoRA's start B is 0, and A has no gradient.

    Args:
        weight_by: `tokens`, `rows` or `equal`.

    Source: Chen et al. 2025, arXiv 2502.01755, algorithm 1.
    Departures: weights as in `fed_avg` (the paper's are equal: `weight_by=equal`). Devices keep nothing between rounds,
        so that both factors go down in each round; only the trained one goes up.

    >>> [list(ro_lora().client(number)["train_only"]) for number in (1, 2)]
    [['B', 'other'], ['A', 'other']]
    """
    facts = Facts(
        "lora",
        "Chen et al. 2025, arXiv 2502.01755",
        "yes",
        linear=True,
        of_mean=True,
        needs="pairs",
        note="Both factors go down, the one that trained goes up.",
    )
    return Recipe(
        "ro_lora",
        checked("ro_lora", weighted_mean()),
        weight_by=weight_by,
        client=lambda number: {"train_only": ["B" if number % 2 else "A", "other"]},
        facts=facts,
    )


def fed_sa_lora(*, weight_by: str = "tokens") -> Recipe:
    """Return FedSA-LoRA: clients train both factors and keep their B; `A <- sum_k p_k A_k`.

    Args:
        weight_by: `tokens`, `rows` or `equal`.

    Source: Guo et al. 2025, arXiv 2410.01463, figure 1 and the method FedSA-LoRA.
    Departures: weights as in `fed_avg` (the paper's are equal: `weight_by=equal`). A client that has not trained yet
        begins with B of the start.
    """
    facts = Facts(
        "lora",
        "Guo et al. 2025, arXiv 2410.01463",
        "personal",
        client_state="its B of every LoRA layer",
        linear=True,
        needs="pairs",
        note="The shared plug-in has the B of the start (zeros): what counts is the plug-in with each client's own B.",
    )
    half = every_round(personal=["B"])
    return Recipe("fed_sa_lora", checked("fed_sa_lora", weighted_mean()), weight_by=weight_by, client=half, facts=facts)


def fed_sb(*, weight_by: str = "tokens") -> Recipe:
    """Return Fed-SB: `R <- sum_k p_k R_k` for the square core of `W + s B R A`, whose B and A are everybody's.

    `sum_k p_k s B R_k A = s B (sum_k p_k R_k) A`: exact, with `rank * rank` numbers a layer on the way.

    Args:
        weight_by: `tokens`, `rows` or `equal`.

    Source: Singhal et al. 2025, arXiv 2502.15436, section 3.
    Departures: weights as in `fed_avg` (the paper's are equal: `weight_by=equal`). Where B and A come from is the
        method's own matter, `peft=lora_sb`.
    """
    half = every_round(train_only=["R", "other"])
    facts = Facts("lora", "Singhal et al. 2025, arXiv 2502.15436", "yes", linear=True, of_mean=True, needs="cores")
    reduce = checked("fed_sb", weighted_mean(), check_cores)
    return Recipe("fed_sb", reduce, weight_by=weight_by, client=half, facts=facts)


def lora_fair(*, ridge: float = 0.01, weight_by: str = "tokens") -> Recipe:
    """Return LoRA-FAIR: both factors averaged, then B corrected so that the product comes nearer the mean of products.

    With the means `A'` and `B'`, `D = argmin |sum_k p_k B_k A_k - (B' + D) A'|^2 + ridge |D|^2`, which is
    `D = E A'^T (A' A'^T + ridge I)^-1` for `E = sum_k p_k B_k A_k - B' A'`. Clients start from `A'` and `B' + D`.

    Args:
        ridge: The weight of `|D|^2`, in units of `A' A'^T` (its diagonal is near 1/3 at LoRA's own start); 0 gives the
            nearest product that `A'` allows, however far B moves.
        weight_by: `tokens`, `rows` or `equal`.

    Raises:
        ConfigError: If `ridge` is negative.

    Source: Bian et al. 2025, arXiv 2411.14961, equation 8.
    Departures: weights as in `fed_avg`. The paper takes gradient steps on a cosine similarity of the products and
        `ridge |D|`, to a point that depends on their number; squares have the one minimum above. The server holds a
        dense fp64 `(out, in)` for each LoRA layer.
    """
    in_range("lora_fair", "ridge", ridge, 0)

    def finish(situation: Situation, products: Tensors, means: Tensors) -> Step:
        step = dict(means)
        for pair in situation.layout.pairs:
            mean = {name: situation.state.tensors[name] + means[name] for name in (pair.a, pair.b)}
            gap = products[pair.module] - plain_product(pair, mean)
            correction = least_ridge(gap, mean[pair.a].double(), ridge)
            step[pair.b] = (means[pair.b].double() + correction).float()
        return Step(step)

    reduce = checked("lora_fair", with_products(finish, ("A", "B", "other")))
    facts = Facts("lora", "Bian et al. 2025, arXiv 2411.14961", "approximate", needs="pairs")
    return Recipe("lora_fair", reduce, weight_by=weight_by, facts=facts)


def least_ridge(gap: torch.Tensor, a: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return D `(out, rank)`, the minimum of `|gap - D a|^2 + ridge |D|^2`; the smallest one if there are many.

    >>> least_ridge(torch.tensor([[4.0]]), torch.tensor([[1.0]]), ridge=1.0)
    tensor([[2.]])
    """
    gram = a @ a.T + ridge * torch.eye(len(a), dtype=a.dtype)
    return gap @ a.T @ torch.linalg.pinv(gram, hermitian=True)
