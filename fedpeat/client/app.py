"""The Flower shell of a client: a message in, an update out.

The handlers are module-level functions of an installed module and the caches are module-level too, so that a long-lived
worker builds each emulated model once and then only loads travelling tensors into it.
"""

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpeat.bundles import build_emulated, open_bundle
from fedpeat.client.attack import attacked, poisoned
from fedpeat.client.changes import changes_for
from fedpeat.client.site import answer, place, without_paths
from fedpeat.client.spec import TrainingSpec
from fedpeat.client.store import Store
from fedpeat.client.train import weight_of
from fedpeat.client.work import Task, work
from fedpeat.codecs import from_description
from fedpeat.core import (
    EMULATOR,
    EXTRA,
    FOLD,
    ClientUpdate,
    FedPeatError,
    PeftError,
    Tensors,
    content_hash,
    peak_gpu_mib,
    peak_rss_mib,
    seed_for,
    without_prefix,
)
from fedpeat.data import open_rows
from fedpeat.emulators import EmulatedModel, EmulatorLora, unfrozen_names
from fedpeat.peft import Tuned, attach
from fedpeat.wire import answer_reply, error_reply, read_arrays, read_job, read_question, update_reply

app = ClientApp()
log = logging.getLogger(__name__)

KEPT_MODELS = 4
"""Emulated models a worker keeps in memory: a federation with more emulators rebuilds the least recently used."""

_MODELS: OrderedDict[str, Tuned] = OrderedDict()
_EMULATORS: WeakKeyDictionary[Tuned, EmulatorLora] = WeakKeyDictionary()


@app.train()
def handle_train(message: Message, context: Context) -> Message:
    """Train as the message's job says; a failure is told in one line, never raised."""

    def trained() -> Message:
        job, arrays = read_job(message)
        return update_reply(_run(place(job, context.node_config), read_arrays(arrays)), to=message)

    return _told(trained, message, context)


@app.query("hello")
def handle_hello(message: Message, context: Context) -> Message:
    """Say who this device is and what it has."""
    return _answered("hello", message, context)


@app.query("bundle")
def handle_bundle(message: Message, context: Context) -> Message:
    """Take a part of a bundle."""
    return _answered("bundle", message, context)


@app.query("begin")
def handle_begin(message: Message, context: Context) -> Message:
    """Prepare this device's rows for a federation."""
    return _answered("begin", message, context)


def _answered(action: str, message: Message, context: Context) -> Message:
    def answered() -> Message:
        return answer_reply(answer(action, context.node_config, *read_question(message)), to=message)

    return _told(answered, message, context)


def _told(work: Callable[[], Message], message: Message, context: Context) -> Message:
    """Return the reply that `work` makes, or what went wrong, in one line that tells of no path of a device's own."""
    try:
        return work()
    except FedPeatError as error:
        reason = str(error)
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason = f"out of memory: {error}; lower client.batch_size or engine.workers"
    except Exception as error:
        log.exception("client failed")
        if os.environ.get("FEDPEAT_DEBUG") == "1":
            raise
        reason = f"{type(error).__name__}: {error}"
    return error_reply(without_paths(reason, context.node_config), to=message)


def tuned_model(job: dict[str, Any]) -> Tuned:
    """Return the emulated model of `job["bundle"]` with its PEFT parameters, from this worker's cache if it is there.

    Raises:
        PeftError: If the frozen PEFT tensors differ from the server's.
    """
    device = resolve_device(job["device"])
    # A method's own random start follows the seed: workers may serve runs of several seeds, one after the other.
    unfreeze, blocks = job.get("unfreeze") or (), job.get("unfreeze_blocks")
    key = content_hash([job["bundle"], job["method"], job["seed"], device, list(unfreeze), blocks])
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
        unfreeze=unfrozen_names(view, unfreeze, blocks=blocks),
    )
    if tuned.frozen_digest != job["frozen_digest"]:
        raise PeftError(
            "the frozen PEFT tensors must be the server's",
            f"{tuned.frozen_digest!r} here, {job['frozen_digest']!r} there",
            "use the same versions of torch and peft on both ends",
        )
    _MODELS[key] = tuned
    return tuned


def forget_models() -> None:
    """Drop the emulated models that this worker keeps."""
    _MODELS.clear()


def resolve_device(name: str) -> str:
    """Return the torch device for `auto`, `cpu` or `cuda`.

    >>> resolve_device("cpu")
    'cpu'
    """
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _run(job: dict[str, Any], arrays: Tensors) -> ClientUpdate:
    started = time.perf_counter()
    client = job["client"]
    tuned = tuned_model(job)
    tuned.fold(without_prefix(FOLD, arrays))
    store, counted = Store(job["state_folder"], client, job["round"], job.get("counted")), job.get("counted") or ()
    version, sent = job.get("changes", ""), without_prefix(EMULATOR, arrays)
    _realign(tuned, changes_for(store, version, sent, server_round=job["round"], rounds=len(counted)))
    rows = poisoned(open_rows(Path(job["data"]), client, "train"), job, client)
    task = Task(client, job["local_steps"], job["start_step"], job["total_steps"], job["seed"], job["extras"])
    result = work(
        tuned,
        rows,
        task=task,
        spec=TrainingSpec(**job["spec"]),
        tensors={name: tensor for name, tensor in arrays.items() if not name.startswith((FOLD, EXTRA, EMULATOR))},
        extras=without_prefix(EXTRA, arrays),
        store=store,
    )
    metrics = {
        **result.metrics,
        "train_rows": float(len(rows)),
        "client_seconds": time.perf_counter() - started,
        "peak_rss_mib": peak_rss_mib(),
        "process": float(os.getpid()),
    }
    if torch.cuda.is_available():
        metrics["peak_gpu_mib"] = peak_gpu_mib()
    weight = weight_of(job["weight_by"], metrics)
    made_with = Path(job["bundle"]).name  # a bundle's folder is called by its version
    update = ClientUpdate(client, job["round"], result.delta, weight, metrics, extras=result.extras, bundle=made_with)
    return encoded(attacked(update, job), job, store)


def _realign(tuned: Tuned, changes: Tensors) -> None:
    """Give the emulator of a worker's model the server's changes; without any, its own weights."""
    if changes and tuned not in _EMULATORS:
        _EMULATORS[tuned] = EmulatorLora(view_of(tuned))
    if tuned in _EMULATORS:
        _EMULATORS[tuned].apply(changes)


def view_of(tuned: Tuned) -> EmulatedModel:
    """Return a tuned model in the form in which emulators know it."""
    view = tuned.view
    return EmulatedModel(tuned.model, view.path, view.sources, view.adapter_positions)  # type: ignore[arg-type]


def encoded(update: ClientUpdate, job: dict[str, Any], store: Store) -> ClientUpdate:
    """Return `update` as the job's codec sends it; the codec's memory goes on from, and into, the client's store."""
    codec = from_description(job["codec"])
    state = store.read("codec") if codec.stateful else {}
    if codec.stateful and store.lost("codec"):
        update = replace(update, metrics={**update.metrics, "state_lost": 1.0})
    state = {name: value for name, value in state.items() if name in update.delta}
    state = {**codec.start(update.delta), **state}
    seed = seed_for(job["seed"], "codec", update.client, update.round)
    delta, after = codec.encode(update.delta, state, seed)
    if codec.stateful:
        store.write("codec", {**store.read("codec"), **after})
    return replace(update, delta=delta, encoding=dict(codec.description))
