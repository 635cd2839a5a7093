"""How do many deltas become one step?

Part of the application, not of the library: `fedpeat` never imports it. A strategy is a `Recipe`: a reducer (many
deltas to one), server steps (one delta to a step) and the client's half as data. It sees named tensors, never models
or data. `RecipeStrategy` is the one Flower `Strategy`, whichever the recipe.

To add one more: a builder in `recipes.py` (with a reducer or server step where it needs one) and a YAML in
`conf/strategy/`; the law suite in `tests/laws/` finds it there.
"""

from strategies.aggregate import Aggregation, aggregate
from strategies.recipes import Recipe, fed_avg
from strategies.reducers import Reducer, weighted_mean
from strategies.server_steps import ServerStep, chain, scale

__all__ = [
    "Aggregation",
    "Recipe",
    "Reducer",
    "ServerStep",
    "aggregate",
    "chain",
    "fed_avg",
    "scale",
    "weighted_mean",
]
