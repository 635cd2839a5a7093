"""What does a device do with a plan?

Pure functions that train a model's travelling tensors on the device's own rows; the Flower shell around them is `app`,
which is not imported here: the server trains with the same functions. `site` is a device's own machine in a real
federation: where its data, bundles and state are.

To add one more schedule: a line in `schedules.SCHEDULES`. Optimisers are those of `torch.optim`, by name.
"""

from fedpeat.client.optimizers import build_optimizer, optimizer_names
from fedpeat.client.schedules import SCHEDULES
from fedpeat.client.spec import Guidance, TrainingSpec
from fedpeat.client.store import Store
from fedpeat.client.train import TrainingResult, train, weight_of
from fedpeat.client.work import Task, Worked, work

__all__ = [
    "SCHEDULES",
    "Guidance",
    "Store",
    "Task",
    "TrainingResult",
    "TrainingSpec",
    "Worked",
    "build_optimizer",
    "optimizer_names",
    "train",
    "weight_of",
    "work",
]
