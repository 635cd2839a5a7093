"""What `devices.py` measures, each in a process of its own: a device opens its bundle, attaches its method, and trains.

All go through the client's own `work`, but for a bare PyTorch loop of full fine-tuning, which holds nothing that only a
federation needs (the tensors at the round's start, the delta): ratios are taken to the cheapest program there is.
"""

import gc
import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.processes import peak, start_peak
from fedpeat.bundles import Bundle, build_emulated, open_bundle, write_bundle
from fedpeat.client import Store, Task, TrainingSpec, work
from fedpeat.client.batches import batch_indices
from fedpeat.client.footprint import footprint
from fedpeat.core import count_bytes, peak_gpu_mib
from fedpeat.data import Rows
from fedpeat.emulators import EmulatedModel, chain, int8, make_emulator, uniform
from fedpeat.models import LoadedModel, find_blocks, make_split, model_tensors
from fedpeat.peft import Tuned, attach

MIB = 2**20
SEED = 0
EPOCH = 1
"""Batches of the device's rows. The first epoch warms up, and computes the hidden states that are kept."""
LORA = {"kind": "lora", "rank": 8, "alpha": 16}
FULL = {"kind": "full"}


class Row(NamedTuple):
    """One way to tune.

    Attributes:
        key: A short name.
        what: As in the table.
        bundle: What the device has, a name of `write_bundles`.
        method: As for `attach`; with `full` of the whole model, everything outside the blocks trains too.
        bare: A bare loop over all weights, instead of the client's `work`.
        prefix: Keep hidden states in front of the first block that trains.
        all_gradients: Have autograd compute gradients of frozen weights too.
    """

    key: str
    what: str
    bundle: str
    method: Mapping[str, Any]
    bare: bool = False
    prefix: bool = False
    all_gradients: bool = False


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        shape: A transformers config's type and fields.
        batch: Rows a step.
        tokens: A row.
        steps: Timed steps of a process, after an epoch that is not.
        threads: Torch threads.
        device: `cpu` or `cuda`.
    """

    shape: Mapping[str, Any]
    batch: int
    tokens: int
    steps: int
    threads: int
    device: str

    def spec(self, *, prefix: bool) -> TrainingSpec:
        """Return how a device trains: AdamW, and the gradient clipped as in a run's settings."""
        kept = 1024.0 if prefix else 0.0
        return TrainingSpec(1e-4, self.batch, clip_norm=1.0, threads=self.threads, prefix_mib=kept)


def write_bundles(folder: Path, sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Write a random model as devices receive it; return folder, MiB of tensors and blocks of each bundle.

    `whole`: every block is the adapter. `ends`: two at each end are, two fifths of the others stand in for the rest.
    `last`: the same, with the last four as the adapter. `int8`: as `ends`, in 8 bits.
    """
    torch.set_num_threads(sizes.threads)
    loaded = random_model(sizes.shape)
    count = find_blocks(loaded.model).count
    few = uniform(kept_blocks=round(0.4 * (count - 4)))
    ends = make_split(count, first=2, last=2)
    wanted = {
        "whole": (make_split(count, blocks="all"), chain(stages={})),
        "ends": (ends, few),
        "last": (make_split(count, first=0, last=4), few),
        "int8": (ends, chain(stages={"few": few, "int8": int8()})),
    }
    found = {}
    for name, (split, builder) in wanted.items():
        emulator = make_emulator(loaded, split=split, builder=builder)
        bundle = write_bundle(loaded, split=split, emulator=emulator, folder=folder)
        found[name] = {"folder": bundle.folder, "mib": bundle.payload_bytes / MIB, "blocks": len(bundle.positions)}
    return found


def random_model(shape: Mapping[str, Any]) -> LoadedModel:
    """Return a model of random weights; what it costs does not depend on what it has learnt."""
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
    return LoadedModel(model.eval().requires_grad_(False), None, "random")


def measure(row: Row, folder: Path, bundle: Path, sizes: Sizes, *, count: bool) -> dict[str, Any]:
    """Train, and return seconds a step, MiB of memory, MiB sent, and if asked for what `footprint` counts.

    Memory is the peak of training minus what the process held before it opened the bundle; what opening takes for a
    moment is left out, weights count once.
    """
    torch.set_num_threads(sizes.threads)
    opened = open_bundle(bundle, verify=False)
    rows = random_rows(opened, sizes)
    before = _start_peak(sizes.device)
    tuned, view = None, private(build_emulated(opened, device=sizes.device))
    if row.bare:
        _start_peak(sizes.device)
        ends, sent = bare_loop(view.model, rows, sizes), 0.0
    else:
        tuned = attached(row, view)
        _start_peak(sizes.device)
        ends, sent = client_work(row, tuned, rows, sizes, folder)
    used = _peak(sizes.device) - before
    return {
        "seconds": [end - begin for begin, end in itertools.pairwise(ends[EPOCH - 1 :])],
        "peak MiB": used,
        "sends MiB": sent,
        "counted": counted(tuned, rows, sizes) if count and tuned else None,
        "kept MiB": sum(path.stat().st_size for path in (folder / row.key).rglob("*.states.npy")) / MIB,
    }


def random_rows(bundle: Bundle, sizes: Sizes) -> Rows:
    """Return an epoch's rows of random tokens."""
    vocabulary = bundle.manifest["model"]["config"]["vocab_size"]
    draw = torch.Generator().manual_seed(SEED)
    ids = torch.randint(vocabulary, (EPOCH * sizes.batch, sizes.tokens), generator=draw)
    return Rows(ids, ids)


def private(view: EmulatedModel) -> EmulatedModel:
    """Make all tensors the process's own: where weights are copied to be trained, the map would count beside them."""
    copies: dict[tuple[Any, ...], torch.Tensor] = {}
    done: set[int] = set()
    for _, tensor, _ in model_tensors(view.model):
        if tensor.device.type == "cpu" and id(tensor) not in done:  # a tied one comes once for each of its names
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if place not in copies:
                copies[place] = tensor.data.clone()
            tensor.data = copies[place]
            done.add(id(tensor))
    return view


def attached(row: Row, view: EmulatedModel) -> Tuned:
    """Attach the row's method."""
    outside = [name for name, _ in view.model.named_parameters() if not name.startswith(f"{view.path}.")]
    tuned = attach(
        view.model,
        method=row.method,
        path=view.path,
        sources=view.sources,
        adapter_positions=view.adapter_positions,
        seed=SEED,
        unfreeze=outside if row.method["kind"] == "full" and row.bundle == "whole" else (),
    )
    if row.all_gradients:
        mine = {id(parameter) for parameter in tuned.parameters}
        others = [one for one in tuned.model.parameters() if id(one) not in mine]

        def ask(_model: nn.Module, _inputs: Any) -> None:
            # In each forward pass: `train` freezes again whatever is not its own.
            for parameter in others:
                parameter.grad = None
                parameter.requires_grad_(True)

        tuned.model.register_forward_pre_hook(ask)
    return tuned


def client_work(row: Row, tuned: Tuned, rows: Rows, sizes: Sizes, folder: Path) -> tuple[list[float], float]:
    """Take one round's steps as a client does; return when each ended, s, and MiB of the delta."""
    steps = EPOCH + sizes.steps
    with _step_ends(sizes.device) as ends:
        worked = work(
            tuned,
            rows,
            task=Task("device", steps, start_step=0, total_steps=steps, seed=SEED),
            spec=sizes.spec(prefix=row.prefix),
            tensors=tuned.initial,
            extras={},
            store=Store(folder / row.key, "device"),
        )
    return ends, count_bytes(worked.delta) / MIB


def bare_loop(model: nn.Module, rows: Rows, sizes: Sizes) -> list[float]:
    """Train all weights on the same batches; return when each step ended, s."""
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    steps = EPOCH + sizes.steps
    order = batch_indices(len(rows), batch_size=sizes.batch, start=0, count=steps, seed=SEED, client="device")
    with _step_ends(sizes.device) as ends:
        for indices in order:
            batch = {name: tensor.to(sizes.device) for name, tensor in rows.batch(indices).items()}
            optimizer.zero_grad(set_to_none=True)
            model(**batch, use_cache=False).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return ends


def counted(tuned: Tuned, rows: Rows, sizes: Sizes) -> dict[str, float]:
    """Return what `footprint` counts, MiB by kind, with the gradients of frozen weights where there are any."""
    found = footprint(tuned, rows, sizes.spec(prefix=False))
    frozen = sum(one.grad.nbytes for one in tuned.model.parameters() if one.grad is not None)
    kinds = {**vars(found), "gradients": found.gradients + frozen}
    return {name: value / MIB for name, value in kinds.items()}


@contextmanager
def _step_ends(device: str) -> Iterator[list[float]]:
    ends: list[float] = []

    def ended(*_: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    handle = register_optimizer_step_post_hook(ended)
    try:
        yield ends
    finally:
        handle.remove()


def _start_peak(device: str) -> float:
    if device == "cpu":
        return start_peak()
    gc.collect()
    torch.cuda.init()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / MIB


def _peak(device: str) -> float:
    return peak() if device == "cpu" else peak_gpu_mib()
