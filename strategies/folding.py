"""Rules for LoRA that fold what factors cannot hold into the base weights of their layers."""

from collections.abc import Mapping

import torch

from fedpeat.core import ClientUpdate, ConfigError, Tensors, nearest, seed_for
from strategies.exactness import plain_product, with_products
from strategies.lora import checked
from strategies.recipe import Facts, Recipe
from strategies.reducers import Reducer, Situation, Step, WeightedSum

MEANS = ("factors", "products")
"""What `fr_lora` takes the mean of."""


def folding_step(situation: Situation, products: Tensors, change: Tensors) -> Step:
    """Return the step that moves travelling tensors by `change` and folds what is then missing.

    Folded is `s (product - B'A')`, B' and A' being the factors after the change to the bit, so that the LoRA layers
    compute `s * product` beside base weight and earlier folds, whatever the factors are.

    Args:
        situation: The round's.
        products: What the layers are to hold, without the scaling, `(out, in)`, fp64, by layer.
        change: What is added to travelling tensors, fp32, by name.
    """
    tensors = situation.state.tensors
    folds: dict[str, torch.Tensor] = {}
    for pair in situation.layout.pairs:
        after = {name: tensors[name] + change[name] if name in change else tensors[name] for name in (pair.a, pair.b)}
        folds[pair.module] = (pair.scaling * (products[pair.module] - plain_product(pair, after))).float()
    return Step(change, folds)


def flora(*, weight_by: str = "tokens") -> Recipe:
    """Return FLoRA: the mean of the clients' products goes into the base weights, and LoRA starts anew each round.

    `W <- W + sum_k p_k s B_k A_k`, then A is drawn at random and B is 0, as at LoRA's own start. Devices may use
    different ranks.

    Args:
        weight_by: `tokens`, `rows` or `equal`.

    Source: Wang et al. 2024, arXiv 2409.05976, the stacking aggregation.
    Departures: weights as in `fed_avg`. Clients of the paper get the stack of all factors (a client's traffic times
        the number of clients) and fold it themselves; devices here keep nothing, and all folds so far go down dense,
        as one sum, with every message. The new A is one for all, drawn by the server, not one for each client. The
        server holds a dense fp64 `(out, in)` for each LoRA layer rather than the stack.
    """

    def finish(situation: Situation, products: Tensors, means: Tensors) -> Step:
        return folding_step(situation, products, {**means, **_to_new_start(situation)})

    facts = Facts(
        "lora",
        "Wang et al. 2024, arXiv 2409.05976",
        "yes",
        needs="pairs",
        rebases=True,
        note="All that was folded goes down dense with every message.",
    )
    reduce = checked("flora", with_products(finish, ("other",)))
    return Recipe("flora", reduce, weight_by=weight_by, mixes_ranks=True, facts=facts)


def _to_new_start(situation: Situation) -> dict[str, torch.Tensor]:
    """Return the changes that bring factors to LoRA's start, as HF peft has it: A uniform, B zero."""
    changes: dict[str, torch.Tensor] = {}
    for pair in situation.layout.pairs:
        a, b = situation.state.tensors[pair.a], situation.state.tensors[pair.b]
        seed = seed_for(situation.seed, "flora", situation.round, pair.module)
        bound = a.shape[1] ** -0.5  # of Kaiming's uniform draw with slope sqrt(5)
        new = torch.empty(a.shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
        changes |= {pair.a: new - a, pair.b: -b}
    return changes


def fed_ex_lora(*, weight_by: str = "tokens") -> Recipe:
    """Return FedEx-LoRA: both factors averaged, and what their product misses folded into the base weights.

    `A' = sum_k p_k A_k`, `B' = sum_k p_k B_k`, `W <- W + s (sum_k p_k B_k A_k - B' A')`.

    Args:
        weight_by: `tokens`, `rows` or `equal`.

    Source: Singhal et al. 2025, arXiv 2410.09432, equations 7 and 8.
    Departures: weights as in `fed_avg` (the paper's are equal: `weight_by=equal`). Devices keep nothing, so that all
        residuals so far go down dense, as one sum, with every message, instead of the round's own as factors. The
        server holds a dense fp64 `(out, in)` for each LoRA layer.
    """
    facts = Facts(
        "lora",
        "Singhal et al. 2025, arXiv 2410.09432",
        "yes",
        needs="pairs",
        note="All that was folded goes down dense with every message.",
    )
    reduce = checked("fed_ex_lora", with_products(folding_step, ("A", "B", "other")))
    return Recipe("fed_ex_lora", reduce, weight_by=weight_by, facts=facts)


def fr_lora(*, mean_of: str = "factors", weight_by: str = "tokens") -> Recipe:
    """Return FRLoRA: each round starts from the factors of the first, and the product's change goes into base weights.

    `W <- W + s (B' A' - B A)`, B and A being the factors of the start and B' and A' the clients' means; the travelling
    factors never move.

    Args:
        mean_of: `factors`, as in the paper; `products` folds `s (sum_k p_k B_k A_k - B A)`, which is exact.
        weight_by: `tokens`, `rows` or `equal`.

    Raises:
        ConfigError: If `mean_of` is neither.

    Source: Yan et al. 2025, ICLR, openreview e0rQRMUhs7, algorithm 1.
    Departures: weights as in `fed_avg`. The paper's start is the pre-trained weight's best approximation of the rank,
        by SVD, halves of the singular values in each factor, and `W - s B A` in place of W. A strategy sees no weights,
        so the start is PEFT's: `peft=hf peft.type=LORA` with the option `init_lora_weights=pissa` is the paper's; with
        LoRA's own each round starts from the same random A and B = 0. Devices keep nothing, so that all that was folded
        goes down dense with every message instead of the means of the round's factors.
    """
    if mean_of not in MEANS:
        raise ConfigError(f"cannot use strategy.mean_of={mean_of}", "no such mean", nearest(mean_of, MEANS))
    facts = Facts(
        "lora",
        "Yan et al. 2025, ICLR, openreview e0rQRMUhs7",
        "no" if mean_of == "factors" else "yes",
        linear=mean_of == "factors",
        of_mean=mean_of == "factors",
        needs="pairs",
        note="All that was folded goes down dense with every message.",
    )
    reduce = _change_of_mean_factors() if mean_of == "factors" else with_products(folding_step, ("other",))
    return Recipe("fr_lora", checked("fr_lora", reduce), weight_by=weight_by, facts=facts)


def _change_of_mean_factors() -> Reducer:
    """Return a reducer that folds what the mean deltas of the factors do to their product, and leaves the factors."""

    def add(total: tuple[Situation, WeightedSum], update: ClientUpdate) -> tuple[Situation, WeightedSum]:
        total[1].add(update.delta, update.weight)
        return total

    def finish(total: tuple[Situation, WeightedSum]) -> Step:
        situation, means = total[0], total[1].mean()
        moved = {name: situation.state.tensors[name].double() + mean.double() for name, mean in means.items()}
        local: Mapping[str, torch.Tensor] = {**situation.state.tensors, **moved}
        products = {pair.module: plain_product(pair, local) for pair in situation.layout.pairs}
        others = {name: mean for name, mean in means.items() if situation.layout.part_of(name) == "other"}
        return folding_step(situation, products, others)

    return Reducer(lambda situation: (situation, WeightedSum()), add, finish)
