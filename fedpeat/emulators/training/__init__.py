"""How is what stands in for the middle trained?

`harmonizers` fits low-rank maps in the place of dropped blocks, in closed form; `distilled` trains the kept blocks
against the full model; `Realigner` keeps them in step with the adapter between rounds.

To add one more term to what they lower: a weight in `Weights` and a line in `Objective.loss`.
"""

from fedpeat.emulators.training.distillation import distilled
from fedpeat.emulators.training.harmonizers import harmonizers
from fedpeat.emulators.training.loop import Pace
from fedpeat.emulators.training.objective import Weights
from fedpeat.emulators.training.realign import EmulatorLora, Realigner, Realignment

__all__ = ["EmulatorLora", "Pace", "Realigner", "Realignment", "Weights", "distilled", "harmonizers"]
