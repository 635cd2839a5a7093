"""How good is the shared model, and what is kept?

Evaluation on held-out data, the server's own training, checkpoints and the history of a run.

To add one more number: a line in `fedpeat.core.METRICS`, its computation where the table says.
"""

from fedpeat.server.checkpoint import Checkpoints, counted_after, read_checkpoint, write_checkpoint
from fedpeat.server.choices import ChoiceResult, check_normalise, choose
from fedpeat.server.evaluate import evaluate
from fedpeat.server.history import History, read_history
from fedpeat.server.participant import NAME as SERVER
from fedpeat.server.participant import Participant, margins

__all__ = [
    "SERVER",
    "Checkpoints",
    "ChoiceResult",
    "History",
    "Participant",
    "check_normalise",
    "choose",
    "counted_after",
    "evaluate",
    "margins",
    "read_checkpoint",
    "read_history",
    "write_checkpoint",
]
