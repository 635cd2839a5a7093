"""Which blocks of the middle stay?

By position (`uniform`, `first`, `last`, `middle_out`, `random_blocks`, `listed`), by a score on public text
(`block_influence`, `angular_distance`, `ablation`, `gradient`), or one for each cluster of like blocks (`cka`);
`shared` lets those that stay compute in the places of the others.

To add one more score: a measure (see `measures.py`), and a builder that keeps the highest, as in `scores.py`.
"""

from fedpeat.emulators.selection.clusters import cka, shared
from fedpeat.emulators.selection.rules import first, last, listed, middle_out, random_blocks, uniform
from fedpeat.emulators.selection.scores import ablation, angular_distance, block_influence, gradient

__all__ = [
    "ablation",
    "angular_distance",
    "block_influence",
    "cka",
    "first",
    "gradient",
    "last",
    "listed",
    "middle_out",
    "random_blocks",
    "shared",
    "uniform",
]
