"""Hidden states in front of the first block that trains: computed once a row, kept over epochs and rounds.

Nothing below that block changes, so that a row enters it as it did the last time. With an adapter at the end of the
model alone this saves the forward pass through the emulator; with a trained first block there is nothing to save.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import nn

from fedpeat.core import StorageError, content_hash, digest
from fedpeat.data import Rows
from fedpeat.peft import Tuned

MIB = 2**20
_RANDOM = re.compile(r"^(?!summary|classifier).*(drop|jitter)")
"""Config fields of rates at which a language model draws at random."""
_DIGESTS: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def frozen_blocks(tuned: Tuned) -> int:
    """Return how many blocks come before the first that trains.

    There are none where something trains in front of the blocks, or the model draws anything at random in training.
    """
    if tuned.prompt_tokens or _draws(tuned.model):
        return 0
    mine = {id(parameter) for parameter in tuned.parameters}
    head = tuned.model.get_output_embeddings()  # type: ignore[operator]
    behind = {id(parameter) for parameter in head.parameters()} if isinstance(head, nn.Module) else set()
    front = tuned.model.get_input_embeddings()  # type: ignore[operator]
    behind -= {id(parameter) for parameter in front.parameters()}
    first = len(tuned.view.sources)
    for name, parameter in tuned.model.named_parameters():
        if id(parameter) in mine and id(parameter) not in behind:
            first = min(first, tuned.view.position(name) or 0)
    return first


def _draws(model: nn.Module) -> bool:
    """Return whether a dropout of the model's own is on; PEFT's own acts in blocks that train."""
    rates = {name: value for name, value in vars(model.config).items() if _RANDOM.search(name)}
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates.values())


class Prefix:
    """The hidden states of one participant's rows, in a file that is mapped.

    Args:
        tuned: The model.
        rows: The participant's rows.
        folder: Where the file goes.
        limit_mib: Largest size of the file; rows beyond it are computed each time.
        precision: Of the forward pass: states of another one are others.

    Raises:
        StorageError: If the file cannot be made.
    """

    def __init__(self, tuned: Tuned, rows: Rows, folder: Path, *, limit_mib: float, precision: str) -> None:
        self.blocks = frozen_blocks(tuned)
        self._stack = tuned.model.get_submodule(tuned.view.path)
        self._path = folder / f"prefix-{_key(tuned, rows, self.blocks, precision)}"
        self._limit = limit_mib * MIB
        self._rows = len(rows)
        self._states: np.memmap | None = None
        self._filled: np.memmap | None = None
        self._dtype = torch.float32
        self._outputs = 0
        self.hits = 0

    @property
    def useful(self) -> bool:
        """Whether there is anything to keep."""
        return self.blocks > 0 and self._limit > 0

    @contextmanager
    def serving(self, indices: torch.Tensor) -> Iterator[None]:
        """Let the model's next forward pass, on these rows, `(batch,)`, begin at the first block that trains.

        Rows that are not kept yet are computed, and kept.
        """
        chosen = indices.numpy()
        if self._outputs and self._states is not None and self._has(chosen):
            self.hits += 1
            with self._replaying(self._read(chosen)):
                yield
        else:
            with self._recording(chosen):
                yield

    def _has(self, chosen: np.ndarray) -> bool:
        filled = self._filled
        return filled is not None and bool((chosen < len(filled)).all()) and bool(filled[chosen].all())

    def _read(self, chosen: np.ndarray) -> torch.Tensor:
        states = torch.from_numpy(np.asarray(self._states[chosen]))  # type: ignore[index]
        return states.view(self._dtype).to(next(self._stack.parameters()).device)

    @contextmanager
    def _replaying(self, states: torch.Tensor) -> Iterator[None]:
        def serve(*_args: Any, **_keywords: Any) -> Any:
            return states if self._outputs == 1 else (states, *([None] * (self._outputs - 2)))

        blocks = list(self._stack.children())[: self.blocks]
        for block in blocks:
            block.forward = serve  # type: ignore[method-assign]
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    @contextmanager
    def _recording(self, chosen: np.ndarray) -> Iterator[None]:
        def record(_block: nn.Module, _inputs: Any, output: Any) -> None:
            self._outputs = 1 + len(output) if isinstance(output, tuple) else 1
            self._write(chosen, (output[0] if isinstance(output, tuple) else output).detach().cpu())

        handle = list(self._stack.children())[self.blocks - 1].register_forward_hook(record)
        try:
            yield
        finally:
            handle.remove()

    def _write(self, chosen: np.ndarray, states: torch.Tensor) -> None:
        if self._states is None:
            self._open(states)
        if self._states is None or self._filled is None:
            return
        fits = chosen < len(self._filled)
        self._states[chosen[fits]] = _bits(states).numpy()[fits]
        self._filled[chosen[fits]] = True

    def _open(self, states: torch.Tensor) -> None:
        """Map the file, made anew unless one of this very shape is there."""
        bits, self._dtype = _bits(states), states.dtype
        row = bits[0].numel() * bits.element_size()
        count = min(self._rows, int(self._limit // row))
        if count == 0:
            return
        shape = (count, *bits.shape[1:])
        path = self._path.with_suffix(".states.npy")
        whole = path.is_file() and path.stat().st_size > count * row
        self._states = _mapped(path, shape, bits.numpy().dtype)
        self._filled = _mapped(self._path.with_suffix(".filled.npy"), (count,), np.dtype(bool))
        if not whole:
            self._filled[:] = False


def _bits(states: torch.Tensor) -> torch.Tensor:
    """Return the states as numbers that numpy has, of the same bits."""
    return states.view(torch.int16) if states.dtype is torch.bfloat16 else states


def _mapped(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    with suppress(OSError, ValueError):  # none yet, or a damaged one: then it is made anew
        kept = open_memmap(path, mode="r+")
        if kept.shape == shape and kept.dtype == dtype:
            return kept
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    except OSError as error:
        raise StorageError(
            f"cannot keep hidden states in {path}", str(error), "free some space, or set client.prefix_mib=0"
        ) from error


def _key(tuned: Tuned, rows: Rows, blocks: int, precision: str) -> str:
    if tuned.model not in _DIGESTS:
        stack = list(tuned.model.get_submodule(tuned.view.path).children())[:blocks]
        frozen = {f"{index}.{name}": one for index, block in enumerate(stack) for name, one in block.named_parameters()}
        front = tuned.model.get_input_embeddings()  # type: ignore[operator]
        frozen |= {f"front.{name}": one for name, one in front.named_parameters()}
        _DIGESTS[tuned.model] = digest(frozen)
    text = {"input_ids": rows.input_ids}
    text |= {} if rows.attention_mask is None else {"attention_mask": rows.attention_mask}
    return content_hash([_DIGESTS[tuned.model], digest(text), blocks, precision, str(tuned.device)])
