"""How do many deltas become one step?

Part of the application, not of the library: `fedpeat` never imports it. A strategy is a `Recipe`: a reducer (many
updates to one step), server steps (on what travels) and the client's half as data. It sees named tensors, never models
or data. `RecipeStrategy` in `flower.py` is the one Flower `Strategy`, whichever the recipe.

To add one more: a builder beside its like (`general`, `adaptive`, `drift`, `lora`, `folding`, `svd`, `robust`, ...) and
a YAML in `conf/strategy/`; the law suite in `tests/laws/test_strategies.py` finds it there.
"""

from strategies.aggregate import Aggregation, aggregate, start
from strategies.recipe import Facts, Recipe
from strategies.reducers import Reducer, Situation, Step, WeightedSum, gathering, weighted_mean
from strategies.server_steps import ServerStep, chain, scale

__all__ = [
    "Aggregation",
    "Facts",
    "Recipe",
    "Reducer",
    "ServerStep",
    "Situation",
    "Step",
    "WeightedSum",
    "aggregate",
    "chain",
    "gathering",
    "scale",
    "start",
    "weighted_mean",
]
