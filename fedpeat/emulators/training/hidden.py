"""Hidden states between a model's blocks, and how far two models' are apart."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from fedpeat.core import Tensors
from fedpeat.emulators.assemble import EmulatedModel
from fedpeat.emulators.harmonizer import hidden_input, hidden_output


class Tap(NamedTuple):
    """Where a hidden state is taken: at a block's input, or at its output.

    Attributes:
        position: The block's position in its model.
        behind: At its output.
    """

    position: int
    behind: bool = False


class _EnoughError(Exception):
    """The last wanted hidden state is there: the rest of the model need not run."""


def hidden_states(
    model: PreTrainedModel, path: str, taps: Sequence[Tap], inputs: Mapping[str, Any], *, further: bool = False
) -> tuple[list[torch.Tensor], Any]:
    """Run a model and return its hidden states at `taps`, `(rows, tokens, width)` each.

    Args:
        model: A causal language model.
        path: Where its blocks are.
        taps: Where to take them.
        inputs: The model's keywords.
        further: Run to the end of the model, though the last tap be passed.

    Returns:
        The hidden states, and the model's output; None in its place unless `further`.
    """
    seen: dict[Tap, torch.Tensor] = {}
    handles = [
        _watch(model.get_submodule(f"{path}.{tap.position}"), tap, seen, None if further else len(set(taps)))
        for tap in set(taps)
    ]
    try:
        output = model(**inputs, use_cache=False)
    except _EnoughError:
        output = None
    finally:
        for handle in handles:
            handle.remove()
    return [seen[tap] for tap in taps], output


def _watch(block: nn.Module, tap: Tap, seen: dict[Tap, torch.Tensor], enough: int | None) -> Any:
    def note(hidden: torch.Tensor) -> None:
        seen[tap] = hidden
        if len(seen) == enough:
            raise _EnoughError

    def entering(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note(hidden_input(args, kwargs))

    def leaving(_block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        note(hidden_output(output))

    if tap.behind:
        return block.register_forward_hook(leaving)
    return block.register_forward_pre_hook(entering, with_kwargs=True)


def meeting_taps(full: EmulatedModel, emulated: EmulatedModel) -> tuple[tuple[Tap, ...], tuple[Tap, ...]]:
    """Return where each run of middle blocks ends, in the full and in the emulated model.

    That is at the input of the next adapter block; behind the last block where none follows.
    """
    adapter = {full.sources[position] for position in full.adapter_positions}
    own = {emulated.sources[position]: position for position in emulated.adapter_positions}
    there, here = [], []
    for index in range(len(full.sources)):
        if index in adapter:
            continue
        if index + 1 == len(full.sources):
            there.append(Tap(index, behind=True))
            here.append(Tap(len(emulated.sources) - 1, behind=True))
        elif index + 1 in adapter:
            there.append(Tap(index + 1))
            here.append(Tap(own[index + 1]))
    return tuple(there), tuple(here)


def gap_parts(
    theirs: Sequence[torch.Tensor], ours: Sequence[torch.Tensor], inputs: Tensors
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return, for each pair of hidden states, the sums of squares of their difference and of `theirs`, in fp32.

    Tokens that `attention_mask` in `inputs` leaves out do not count.
    """
    mask = inputs.get("attention_mask")
    real = ... if mask is None else mask.bool()
    pairs = [(target.detach()[real].float(), own[real].float()) for target, own in zip(theirs, ours, strict=True)]
    return [((target - own).square().sum(), target.square().sum()) for target, own in pairs]


def relative(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return the hidden gap: the mean over pairs of `mean(((h_T - h_S) / rms(h_T))**2)`, from `gap_parts`."""
    return torch.stack([apart / scale.clamp_min(torch.finfo(scale.dtype).tiny) for apart, scale in parts]).mean()


def in_batches(rows: Tensors, size: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Yield `rows` in order, `size` at a time, on `device`."""
    for start in range(0, len(rows["input_ids"]), size):
        yield {name: tensor[start : start + size].to(device) for name, tensor in rows.items()}


def without_labels(rows: Tensors) -> dict[str, torch.Tensor]:
    """Return what a model needs of `rows` if no loss is asked for."""
    return {name: tensor for name, tensor in rows.items() if name != "labels"}
