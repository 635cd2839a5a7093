"""Flower client apps that do nothing, or nothing but one thing: what is left of a round's time is the framework's.

They are module-level, as fedpeat's own app is, so that Ray sends a reference to them and not a copy.
"""

import os
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpeat.client.app import handle_train, tuned_model
from fedpeat.core import ClientUpdate, zeros_like
from fedpeat.data import open_rows
from fedpeat.wire import read_arrays, read_job, update_reply

no_op = ClientApp()
"""Replies with zeros of the shapes it was sent."""
reader = ClientApp()
"""Opens its client's rows, then replies with zeros."""
copier = ClientApp()
"""Trains as fedpeat's app does, on private copies of the bundle's tensors instead of a shared map of its files."""

_COPIED: set[int] = set()


@no_op.train()
def reply_zeros(message: Message, _context: Context) -> Message:
    """Reply with zeros."""
    job, arrays = read_job(message)
    return _zeros(message, job, zeros_like(read_arrays(arrays)), rows=0)


@reader.train()
def read_and_reply_zeros(message: Message, _context: Context) -> Message:
    """Open the client's rows, then reply with zeros."""
    job, arrays = read_job(message)
    rows = open_rows(Path(job["data"]), job["client"], "train")
    return _zeros(message, job, zeros_like(read_arrays(arrays)), rows=len(rows))


@copier.train()
def copy_and_train(message: Message, context: Context) -> Message:
    """Make every frozen tensor private, once a worker, then train."""
    tuned = tuned_model(read_job(message)[0])
    if id(tuned) not in _COPIED:
        with torch.no_grad():
            for parameter in tuned.model.parameters():
                parameter.data = parameter.data.clone()
        _COPIED.add(id(tuned))
    return handle_train(message, context)


def _zeros(message: Message, job: dict[str, Any], delta: dict[str, torch.Tensor], *, rows: int) -> Message:
    metrics = {"train_loss": 0.0, "train_tokens": 1.0, "train_rows": float(rows), "process": float(os.getpid())}
    about = {"encoding": job["codec"], "bundle": Path(job["bundle"]).name}
    update = ClientUpdate(job["client"], job["round"], delta, weight=1.0, metrics=metrics, **about)
    return update_reply(update, to=message)
