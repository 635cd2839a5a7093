"""What a visit needs of a device, by a short real one: FLOP a step, and the peak of all tensors at once."""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fedpeat.client.spec import TrainingSpec
from fedpeat.client.store import Store
from fedpeat.client.work import Task, work
from fedpeat.core import count_bytes
from fedpeat.data import Rows
from fedpeat.models import model_tensors
from fedpeat.peft import Tuned

STEPS = 2
"""In the second one the optimiser's memory is there from the start."""
MESSAGES = 2
"""Copies of the travelling tensors as bytes: the message that a device works on, and the reply that it makes."""
HEAP_LIMIT = 32 * 2**20
"""Bytes from which glibc maps a block and gives it back at once; smaller ones come from its heap."""
HEAP_WASTE = 0.7
"""Bytes that the heap holds beside each byte of blocks that come and go with a step: fitted to resident memory, since
aligned blocks leave holes that others of their size do not fit (benchmarks/modelled.py)."""
PROCESS_BYTES = 35 * 2**20
"""What a first step loads into a process beside tensors: code of autograd, optimisers, kernels; fitted likewise."""


@dataclass(frozen=True)
class Needs:
    """What a visit needs.

    Attributes:
        step_flops: Of one optimiser step, FLOP; norms, activation functions and the optimiser itself left out.
        weights: Every parameter and buffer as it is stored, each storage once, bytes.
        working: Largest sum of all other tensors at once, those of the messages too, bytes.
        overhead: What process and allocator add on a CPU, bytes; 0 on a GPU.
    """

    step_flops: int
    weights: int
    working: int
    overhead: int

    @property
    def memory_bytes(self) -> int:
        """Memory of the visit over that of a process with its imports done: weights and all else, bytes."""
        return self.weights + self.working + self.overhead


def needs(tuned: Tuned, rows: Rows, spec: TrainingSpec) -> Needs:
    """Return what a visit needs, by a real one of two steps; `tuned` is left as it was.

    Unlike `footprint`, which adds up what training keeps, this follows every storage from its first operation to its
    end: logits, log-probabilities and their gradients while they last, the optimiser's transients, the tensors that
    came, those at the round's start, the delta. What kernels allocate inside an operation is not seen.

    Args:
        tuned: The model; it must hold its initial tensors.
        rows: Any rows of as many tokens as it will train on; those of the first batch need a token to score.
        spec: How it will train.

    Raises:
        ConfigError: If the optimiser cannot be built.
        DataError: If there are no rows, or no token to score.
        UpdateRefused: If the loss is not finite.
    """
    plain = replace(spec, learning_rate=0.0, compile=False, optimizer_state="reset", prefix_mib=0.0)
    held = {(one.device, one.data_ptr(), one.nbytes): one.nbytes for _, one, _ in model_tensors(tuned.model)}
    before, following = tuned.read(), _Following()
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    try:
        with following, counter:
            came = tuned.read()
            task = Task(client="", steps=STEPS, start_step=0, total_steps=STEPS, seed=0)
            work(tuned, rows, task=task, spec=plain, tensors=came, extras={}, store=Store(None, ""))
    finally:
        following.end()
        tuned.write(before)
    working = following.peak() + (1 + MESSAGES) * count_bytes(before)  # and the tensors as the method was attached
    waste = following.peak(HEAP_WASTE) - following.peak() + PROCESS_BYTES if tuned.device.type == "cpu" else 0
    return Needs(counter.get_total_flops() // STEPS, sum(held.values()), working, waste)


class _Following(TorchDispatchMode):
    """Follow the storages that operations make, from their first operation to their end."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: list[int] = []
        self._events: list[tuple[int, bool]] = []  # number of a storage, whether it came
        self._known: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._lasting: set[int] = set()
        self._hook = register_optimizer_step_post_hook(lambda *_: self._stepped())

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # What an operation is given is known, or was there before.
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in given and storage._cdata not in self._known:
                self._follow(storage._cdata, storage)
        return result

    def _follow(self, place: int, storage: torch.UntypedStorage) -> None:
        number = len(self._sizes)

        def gone(_: weakref.ref[torch.UntypedStorage]) -> None:
            del self._known[place]
            self._events.append((number, False))

        self._sizes.append(storage.nbytes())
        self._events.append((number, True))
        self._known[place] = (number, weakref.ref(storage, gone))

    def _stepped(self) -> None:
        self._lasting |= {number for number, _ in self._known.values()}

    def end(self) -> None:
        """Follow no more."""
        self._hook.remove()
        self._known.clear()  # with the references go their callbacks

    def peak(self, waste: float = 0.0) -> int:
        """Return the largest sum of storages at once, bytes; small ones that come and go weigh `1 + waste`."""
        live = most = 0.0
        for number, came in self._events:
            size = self._sizes[number]
            passing = size < HEAP_LIMIT and number not in self._lasting
            live += (1 if came else -1) * size * (1 + waste * passing)
            most = max(most, live)
        return round(most)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [one.untyped_storage() for one in tree_leaves(tree) if isinstance(one, torch.Tensor)]


def _forward(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:  # noqa: ARG001
    return sdpa_flop_count(query, key, value)


def _backward(out: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:  # noqa: ARG001
    return sdpa_backward_flop_count(out, query, key, value)


_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
"""Torch's counter knows attention's kernels for GPUs only."""
