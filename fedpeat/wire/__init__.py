"""How do values become Flower records, and how large are they?

Tensors travel as Flower arrays under canonical names (bfloat16, which Flower refuses, as its 16 bits); everything else
as one JSON string. Nothing is pickled here.

To add one more message: a pair of functions in `messages.py`, write and read, and a round-trip test.
"""

from fedpeat.wire.messages import (
    answer_reply,
    error_reply,
    question,
    raw_arrays,
    read_answer,
    read_failure,
    read_job,
    read_question,
    read_update,
    train_message,
    update_reply,
)
from fedpeat.wire.records import read_arrays, to_arrays

__all__ = [
    "answer_reply",
    "error_reply",
    "question",
    "raw_arrays",
    "read_answer",
    "read_arrays",
    "read_failure",
    "read_job",
    "read_question",
    "read_update",
    "to_arrays",
    "train_message",
    "update_reply",
]
