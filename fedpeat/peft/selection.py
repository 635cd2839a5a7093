"""Pick the tensors that train out of a model that a method was attached to, and check where they are."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from fedpeat.core import PeftError, digest
from fedpeat.peft.names import View
from fedpeat.peft.pairs import ADAPTER_NAME, layout_of, plain_layers
from fedpeat.peft.tuned import Tuned

_PROMPT, _INNER = "prompt_encoder.", "base_model."


def pick(
    model: nn.Module,
    *,
    wrapper: PeftModel | None,
    view: View,
    ends: Iterable[nn.Parameter],
    base: Iterable[torch.Tensor],
    identity: bool,
    unfrozen: Sequence[str] = (),
) -> Tuned:
    """Return `model` with its trainable tensors picked out, which are fp32 from here on.

    Args:
        model: The model, its method attached.
        wrapper: HF peft's view of it, None for a model that trains its own weights.
        view: Where its blocks are.
        ends: Parameters of the head and the embeddings that are to train too.
        base: The tensors that the model had before the method was attached.
        identity: Whether its output is unchanged so far.
        unfrozen: Canonical names of those of the emulator's own tensors that are to train too.

    Raises:
        PeftError: If nothing trains, or something outside the adapter blocks would.
    """
    own, wanted = {id(tensor) for tensor in base}, {id(parameter) for parameter in ends}
    outer = wrapper or model
    local = _stripper(wrapper)
    trained: dict[str, nn.Parameter] = {}
    frozen: dict[str, torch.Tensor] = {}
    for wrapped, tensor in _named_tensors(outer):
        name = local(wrapped, id(tensor) in own)
        if isinstance(tensor, nn.Parameter) and (tensor.requires_grad or id(tensor) in wanted):
            if id(tensor) not in wanted and not _may_train(wrapped, name, wrapper, view):
                raise PeftError(
                    "only tensors of the adapter blocks may train",
                    f"this method trains {name}, which acts outside them",
                    "choose other targets or another method; for the head, set peft.train_head=true",
                )
            trained[view.canonical(name)] = _as_fp32(tensor, copy=id(tensor) in own)
        elif id(tensor) not in own:
            frozen[view.canonical(name)] = tensor
    frozen |= {view.canonical(name): tensor for name, tensor in _saved(wrapper, local)}
    frozen = {name: tensor for name, tensor in frozen.items() if name not in trained}
    if not trained:
        raise PeftError("nothing would train", "the method has no trainable tensor here", "change peft.type or targets")
    names = tuple(sorted(trained))
    layers = {} if wrapper is None else plain_layers(model, view)
    prompt = wrapper.active_peft_config if wrapper and wrapper.active_peft_config.is_prompt_learning else None
    return Tuned(
        model=wrapper if wrapper and prompt else model,
        names=names,
        parameters=tuple(trained[name] for name in names),
        initial={name: trained[name].detach().to("cpu", copy=True) for name in names},
        layout=replace(layout_of(layers, names), unfrozen=tuple(sorted(unfrozen))),
        layers=layers,
        frozen_digest=digest(frozen) if frozen else "",
        identity_at_start=identity,
        view=view,
        prompt_tokens=getattr(prompt, "num_virtual_tokens", 0),
        wrapper=wrapper,
    )


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _saved(wrapper: PeftModel | None, local: Callable[[str, bool], str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what HF peft saves: it knows of index tensors that are neither parameters nor buffers."""
    if wrapper is None or wrapper.active_peft_config.is_prompt_learning:
        return
    for name, tensor in get_peft_model_state_dict(wrapper, save_embedding_layers=False).items():
        yield local(name, False), tensor


def _stripper(wrapper: PeftModel | None) -> Callable[[str, bool], str]:
    """Return a function from a name in `wrapper` to that in the model; its flag tells the model's own tensors."""
    if wrapper is None:
        return lambda name, _own: name
    inner = _INNER if wrapper.active_peft_config.is_prompt_learning else f"{_INNER}model."

    def strip(name: str, own: bool) -> str:
        name = name.removeprefix(inner).removeprefix(_INNER)
        without = {"base_layer"} if own else {"base_layer", ADAPTER_NAME}
        return ".".join(part for part in name.split(".") if part not in without)

    return strip


def _may_train(wrapped: str, name: str, wrapper: PeftModel | None, view: View) -> bool:
    """Return whether a tensor acts on adapter blocks alone, or on the input."""
    if view.in_adapter(name):
        return True
    if wrapper is None:
        return False
    if wrapper.active_peft_config.is_prompt_learning:
        return wrapped.startswith(_PROMPT)
    # Banks that layers share stand beside the model in HF peft's wrapper, and all layers it acts on are in the adapter.
    return not wrapped.startswith(f"{_INNER}model.")


def _as_fp32(parameter: nn.Parameter, *, copy: bool) -> nn.Parameter:
    """Make a parameter trainable and fp32, in place; `copy` moves one of the model's own off its (mapped) storage."""
    parameter.data = parameter.detach().to(torch.float32, copy=copy)
    parameter.requires_grad_(True)
    return parameter
