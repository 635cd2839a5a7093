"""The Flower shell of a client: a message in, an update out.

The handlers are module-level functions of an installed module and the caches are module-level too, so that a long-lived
worker builds each emulated model once and then only loads travelling tensors into it.
"""

import logging
import os
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpeat.client.train import TrainingSpec, train, weight_of
from fedpeat.core import (
    ClientUpdate,
    FedPeatError,
    PeftError,
    content_hash,
    peak_gpu_mib,
    peak_rss_mib,
    read_tensors,
    write_tensors,
)
from fedpeat.data import open_rows
from fedpeat.emulators import build_emulated, open_bundle
from fedpeat.peft import Tuned, attach
from fedpeat.wire import error_reply, read_arrays, read_job, update_reply

app = ClientApp()
log = logging.getLogger(__name__)

KEPT_MODELS = 4
"""Emulated models a worker keeps in memory: a federation with more emulators rebuilds the least recently used."""

_MODELS: OrderedDict[str, Tuned] = OrderedDict()


@app.train()
def handle_train(message: Message, _context: Context) -> Message:
    """Train as the message's job says; a failure is told in one line, never raised."""
    try:
        job, arrays = read_job(message)
        return update_reply(_run(job, read_arrays(arrays)), to=message)
    except FedPeatError as error:
        return error_reply(str(error), to=message)
    except (MemoryError, torch.OutOfMemoryError) as error:
        return error_reply(f"out of memory: {error}; lower client.batch_size or engine.workers", to=message)
    except Exception as error:
        log.exception("client failed")
        if os.environ.get("FEDPEAT_DEBUG") == "1":
            raise
        return error_reply(f"{type(error).__name__}: {error}", to=message)


def tuned_model(job: dict[str, Any]) -> Tuned:
    """Return the emulated model of `job["bundle"]` with its PEFT parameters, from this worker's cache if it is there.

    Raises:
        PeftError: If the frozen PEFT tensors differ from the server's.
    """
    device = resolve_device(job["device"])
    key = content_hash([job["bundle"], job["method"], device])
    if key in _MODELS:
        _MODELS.move_to_end(key)
        return _MODELS[key]
    while len(_MODELS) >= KEPT_MODELS:
        _MODELS.popitem(last=False)
    view = build_emulated(open_bundle(Path(job["bundle"]), verify=False), device=device)
    tuned = attach(
        view.model,
        method=job["method"],
        path=view.path,
        sources=view.sources,
        adapter_positions=view.adapter_positions,
        seed=job["seed"],
    )
    if tuned.frozen_digest != job["frozen_digest"]:
        raise PeftError(
            "the frozen PEFT tensors must be the server's",
            f"{tuned.frozen_digest!r} here, {job['frozen_digest']!r} there",
            "use the same versions of torch and peft on both ends",
        )
    _MODELS[key] = tuned
    return tuned


def resolve_device(name: str) -> str:
    """Return the torch device for `auto`, `cpu` or `cuda`.

    >>> resolve_device("cpu")
    'cpu'
    """
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _run(job: dict[str, Any], tensors: dict[str, torch.Tensor]) -> ClientUpdate:
    started = time.perf_counter()
    client = job["client"]
    tuned = tuned_model(job)
    tuned.write(tensors)
    rows = open_rows(Path(job["data"]), client, "train")
    spec = TrainingSpec(**job["spec"])
    kept = _optimizer_state_file(job)
    result = train(
        tuned,
        rows,
        spec=spec,
        steps=job["local_steps"],
        start_step=job["start_step"],
        total_steps=job["total_steps"],
        seed=job["seed"],
        client=client,
        optimizer_state=read_tensors(kept) if kept and kept.exists() else None,
    )
    if kept and result.optimizer_state is not None:
        write_tensors(kept, result.optimizer_state)
    metrics = {
        **result.metrics,
        "train_rows": float(len(rows)),
        "client_seconds": time.perf_counter() - started,
        "peak_rss_mib": peak_rss_mib(),
        "process": float(os.getpid()),
    }
    if torch.cuda.is_available():
        metrics["peak_gpu_mib"] = peak_gpu_mib()
    return ClientUpdate(client, job["round"], result.delta, weight_of(job["weight_by"], metrics), metrics)


def _optimizer_state_file(job: dict[str, Any]) -> Path | None:
    """Return where this client keeps its optimiser's state between rounds, or None if it keeps none."""
    if job["spec"].get("optimizer_state") != "keep" or not job["state_folder"]:
        return None
    return Path(job["state_folder"]) / content_hash(job["client"]) / "optimizer.safetensors"
