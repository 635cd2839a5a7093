"""Attach a method to a model: pick what trains, freeze the rest, check that it is as it should be."""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from fedpeat.core import PeftError, nearest, seed_for
from fedpeat.peft.methods import CHANGES_OUTPUT, build_config
from fedpeat.peft.names import View
from fedpeat.peft.pairs import ADAPTER_NAME
from fedpeat.peft.precision import run_in_own_precision
from fedpeat.peft.selection import pick
from fedpeat.peft.square import put_cores
from fedpeat.peft.targets import modules_in_blocks
from fedpeat.peft.tuned import Tuned

_KEYWORDS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"rank": 8, "alpha": 16, "dropout": 0.0, "targets": None, "train_head": False},
    "lora_sb": {"rank": 8, "alpha": 16, "dropout": 0.0, "targets": None, "train_head": False},
    "full": {"train_embeddings": False, "train_head": False},
    "hf": {"type": None, "options": {}, "train_head": False},
}
"""The keywords of each kind of method, and what they are when left out."""

_UNCHANGED, _CHANGED = 1e-4, 1e-3
"""Relative to the largest logit: up to the first the output is unchanged (weights that are rebuilt round), beyond the
second a method that is not known to change it does so by its options."""
_BF16_ROUNDING = 5e-2


def attach(
    model: PreTrainedModel,
    *,
    method: Mapping[str, Any],
    path: str,
    sources: Sequence[int],
    adapter_positions: Sequence[int],
    seed: int,
    unfreeze: Collection[str] = (),
) -> Tuned:
    """Attach `method` to the adapter blocks of `model`, in place, and freeze everything else.

    Wherever it is called with the same seed (on the full model, on emulated models of any depth) the method's tensors
    start alike, trainable and frozen ones. The global random state is left as it was.

    Args:
        model: A causal language model; a model takes one method.
        method: `kind` and its keywords. `lora`: `rank`, `alpha`, `dropout`, `targets` (names or their endings; None for
            all linear layers), `train_head`. `lora_sb`: the same keywords; only a square core between fixed factors
            trains. `full`: the adapter blocks' own weights, `train_embeddings`, `train_head`.
            `hf`: `type` and `options` of any HF `PeftConfig`, `train_head`.
        path: Where the blocks are, such as `model.layers`.
        sources: For each block position, its index in the full model.
        adapter_positions: Positions of the adapter blocks.
        seed: The run's seed.
        unfreeze: Names, in `model`, of parameters outside the adapter blocks that are to train too.

    Raises:
        PeftError: If the method, a keyword or a target is unknown, nothing trains, something outside the adapter blocks
            would train, or the output changes at the start though the method is not known to do that.
    """
    kind, chosen = _read_method(method)
    view = View(path=path, sources=tuple(sources), adapter_positions=tuple(sorted(adapter_positions)))
    if getattr(model, "peft_config", None) is not None:
        raise PeftError("cannot attach PEFT", "the model has a PEFT method already", "start from a fresh model")
    if not view.adapter_positions:
        raise PeftError(
            "cannot attach PEFT", "the adapter has no blocks", "raise model.split.first or model.split.last"
        )
    also = [model.get_parameter(name) for name in unfreeze]
    ends = [*_ends(model, chosen), *also]
    unfrozen = [view.canonical(name) for name in unfreeze]
    base = [*model.parameters(), *model.buffers()]
    run_in_own_precision(model)
    model.requires_grad_(False)
    if kind == "full":
        for position in view.adapter_positions:
            model.get_submodule(f"{path}.{position}").requires_grad_(True)
        return pick(model, wrapper=None, view=view, ends=ends, base=base, identity=True, unfrozen=unfrozen)
    modules = modules_in_blocks(model, path=path, positions=view.adapter_positions)
    config = _config(kind, chosen, model, modules)
    before = _probe(model, model.get_input_embeddings())
    with _one_thread():
        wrapper = _wrap(model, config, seed)
        if kind == "lora_sb":
            put_cores(model, ADAPTER_NAME)
    tuned = pick(model, wrapper=wrapper, view=view, ends=ends, base=base, identity=False, unfrozen=unfrozen)
    return replace(tuned, identity_at_start=_unchanged(tuned, before, model, config))


def _read_method(method: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    kind = method.get("kind", "")
    if kind not in _KEYWORDS:
        raise PeftError(f"cannot use the method {kind!r}", "no such kind", nearest(str(kind), _KEYWORDS))
    defaults = _KEYWORDS[kind]
    for key in method:
        if key != "kind" and key not in defaults:
            raise PeftError(f"cannot set peft.{key}", f"peft={kind} has no such key", nearest(key, defaults))
    return kind, {**defaults, **{key: value for key, value in method.items() if key != "kind"}}


def _config(kind: str, chosen: Mapping[str, Any], model: PreTrainedModel, modules: dict[str, nn.Module]) -> PeftConfig:
    if kind == "hf":
        if not chosen["type"]:
            raise PeftError("peft=hf needs a type", "none was given", "set peft.type, such as IA3")
        return build_config(chosen["type"], chosen["options"] or {}, model=model, modules=modules)
    if chosen["rank"] < 1:
        raise PeftError(f"cannot use peft.rank={chosen['rank']}", "LoRA needs a rank of 1 or more", "raise peft.rank")
    options = {"r": chosen["rank"], "lora_alpha": chosen["alpha"], "lora_dropout": chosen["dropout"]}
    return build_config(
        "LORA", options | {"target_modules": chosen["targets"] or "all-linear"}, model=model, modules=modules
    )


def _ends(model: PreTrainedModel, chosen: Mapping[str, Any]) -> list[nn.Parameter]:
    """Return the parameters of the head and the embeddings, as far as they are to train."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    heads = [] if head is None else list(head.parameters())
    inputs = list(embeddings.parameters()) if chosen.get("train_embeddings") else []
    if not chosen["train_head"]:
        return inputs
    if not heads:
        raise PeftError("cannot train the head", f"{type(model).__name__} has none", "set peft.train_head=false")
    shared = {id(parameter) for parameter in embeddings.parameters()}
    if not inputs and any(id(parameter) in shared for parameter in heads):
        raise PeftError(
            "cannot train the head alone",
            "it is tied to the embeddings: one tensor for both",
            "set peft.train_head=false, or train both: peft=full peft.train_head=true peft.train_embeddings=true",
        )
    return [*heads, *inputs]


def _wrap(model: PreTrainedModel, config: PeftConfig, seed: int) -> PeftModel:
    """Put the method's tensors into `model`, from a random state of their own."""
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
            # It warns of its own deprecations, of a flag it sets right, of merging: what matters here is checked below.
            warnings.simplefilter("ignore")
            torch.manual_seed(seed_for(seed, "peft"))
            return get_peft_model(model, config, adapter_name=ADAPTER_NAME)  # type: ignore[return-value]
    except Exception as error:
        what = f"cannot attach {PeftType(config.peft_type).name}"
        raise PeftError(what, f"HF peft says: {error}", "change peft.type or peft.options") from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run on one thread: the bits of a decomposition, which some starts are, depend on how many a process has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def _probe(model: nn.Module, embeddings: nn.Module) -> torch.Tensor:
    """Return the logits `(1, 8, vocabulary)` of a fixed random input, in evaluation mode."""
    training, device = model.training, next(model.parameters()).device
    count = next(embeddings.parameters()).shape[0]
    tokens = torch.randint(count, (1, 8), generator=torch.Generator().manual_seed(0)).to(device)
    model.eval()
    try:
        return model(input_ids=tokens, use_cache=False).logits.float()
    finally:
        model.train(training)


def _unchanged(tuned: Tuned, before: torch.Tensor, model: PreTrainedModel, config: PeftConfig) -> bool:
    """Return whether the output is as it was before.

    Raises:
        PeftError: If it is not, and the method is not known to change it.
    """
    name = PeftType(config.peft_type).name
    if tuned.prompt_tokens:
        return False
    moved = float(
        (_probe(model, model.get_input_embeddings()) - before).abs().max() / before.abs().max().clamp_min(1e-6)
    )
    dtype = next(tensor.dtype for tensor in model.parameters() if not tensor.requires_grad)
    slack = 0.0 if dtype is torch.float32 else _BF16_ROUNDING
    if moved > max(_CHANGED, slack) and name not in CHANGES_OUTPUT:
        raise PeftError(
            f"{name} should leave the output unchanged before training",
            f"logits move by {moved:.1%} of the largest",
            "drop the option that starts it at random (such as init_lora_weights=false)",
        )
    return moved <= max(_UNCHANGED, slack)
