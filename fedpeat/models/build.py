"""A model from its description: structure first, on the meta device and without memory, then its tensors."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import meta_device_safe_creation_ops, no_init_weights

from fedpeat.core import ModelError, Tensors, nearest, shorten
from fedpeat.models.tensors import model_tensors

ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_REGISTERED: dict[str, type[PreTrainedModel]] = {}
# What a config says of the machine it was made on, or of code to fetch: not part of the model.
_NOT_OF_THE_MODEL = (
    "_name_or_path",
    "transformers_version",
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
)


def register_model_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Allow a model class of your own to be rebuilt from a bundle; usable as a decorator.

    Both ends call it: a bundle holds the class's name, never its code. Classes of transformers need no registration.

    Args:
        cls: A `PreTrainedModel` with `config_class` (or an annotated `config`), built by `cls(config)`.

    Raises:
        ModelError: If it is no such class, or its name is taken.
    """
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls.config_class is not None):
        raise ModelError(f"cannot register {cls!r}", "it is no PreTrainedModel with a config_class", "subclass it")
    known = _REGISTERED.get(cls.__name__, getattr(transformers, cls.__name__, cls))
    if known is not cls and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        found = f"that name belongs to {known.__module__}.{known.__qualname__}"
        raise ModelError(f"cannot register {cls.__name__}", found, "give the class another name")
    _REGISTERED[cls.__name__] = cls
    return cls


def find_class(name: str) -> type[PreTrainedModel]:
    """Return transformers' own or a registered model class; never imports anything by a name from a file.

    Raises:
        ModelError: If there is none.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.__module__.startswith("transformers."):
        return found
    remedy = "call fedpeat.models.register_model_class(YourClass) on this machine too, or use its transformers version"
    raise ModelError(f"cannot build a {name!r}", "it is neither transformers' own nor registered", remedy)


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """Return all that is needed to build `model`'s structure again, as JSON-like values.

    Raises:
        ModelError: If its class is unknown to `find_class`, or it is quantised.
    """
    name = type(model).__name__
    if find_class(name) is not type(model):
        raise ModelError(f"cannot describe this {name}", "another class of that name is known", "rename the class")
    if getattr(model, "quantization_method", None) is not None or hasattr(model.config, "quantization_config"):
        found = "it is a quantised checkpoint"
        raise ModelError(f"cannot describe this {name}", found, "load the unquantised model")
    config = json.loads(model.config.to_json_string(use_diff=False))
    generation = getattr(model, "generation_config", None)
    return {
        "class": name,
        "config": {key: value for key, value in config.items() if key not in _NOT_OF_THE_MODEL},
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation or "eager",
        "generation": _generation_settings(generation) if generation is not None else None,
    }


def _generation_settings(generation: GenerationConfig) -> dict[str, Any]:
    settings = json.loads(generation.to_json_string(use_diff=True))
    return {key: value for key, value in settings.items() if key not in (*_NOT_OF_THE_MODEL, "_from_model_config")}


def build_skeleton(description: Mapping[str, Any]) -> PreTrainedModel:
    """Build the structure that `describe` described, at full depth, without memory for its tensors.

    All parameters and buffers are on the meta device; `fill` gives them values. The model is in eval mode.

    Raises:
        ModelError: If the class is unknown, or does not accept the config.
    """
    cls = find_class(str(description["class"]))
    attention, dtype = description["attention"], description["dtype"]
    if attention not in ATTENTIONS:
        raise ModelError(
            f"cannot build a {cls.__name__} with attention {attention!r}",
            "no such choice",
            nearest(attention, ATTENTIONS),
        )
    if dtype not in DTYPES:
        raise ModelError(f"cannot build a {cls.__name__} in {dtype!r}", "no such type", nearest(dtype, DTYPES))
    plain = {key: _decoded(value) for key, value in description["config"].items() if key not in _NOT_OF_THE_MODEL}
    try:
        config = cls.config_class.from_dict(plain)  # type: ignore[union-attr]
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"{cls.__name__}.config_class is no PreTrainedConfig")
        with _without_memory():
            model = cls._from_config(config, dtype=DTYPES[dtype], attn_implementation=attention)
    except Exception as error:  # whatever a model class raises on a config it does not like
        found, remedy = f"{type(error).__name__}: {error}", "use the transformers version that described the model"
        raise ModelError(f"cannot build a {cls.__name__} from its description", found, remedy) from error
    if description.get("generation") is not None:
        model.generation_config = GenerationConfig.from_dict(dict(description["generation"]))
    return model.eval()


def _decoded(value: Any) -> Any:
    # transformers writes what JSON lacks as {"__float__": "Infinity"}.
    if isinstance(value, dict):
        return float(value["__float__"]) if set(value) == {"__float__"} else {k: _decoded(v) for k, v in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value


def check_plain(model: PreTrainedModel, description: Mapping[str, Any], *, what: str) -> None:
    """Check that `model` has the parameters of its class and no others, as with PEFT layers attached.

    Raises:
        ModelError: With the first names in excess or missing; `what` says what was to be done.
    """
    # Tied parameters under all their names: a skeleton's need not be tied yet.
    expected = {name for name, _ in build_skeleton(description).named_parameters(remove_duplicate=False)}
    odd = sorted({name for name, _ in model.named_parameters(remove_duplicate=False)} ^ expected)
    if odd:
        found = f"its parameters are not those of a {type(model).__name__}: {shorten(odd, 3)}"
        raise ModelError(f"cannot {what}", found, "merge or remove attached PEFT layers first")


@contextlib.contextmanager
def _without_memory() -> Iterator[None]:
    with torch.device("meta"), meta_device_safe_creation_ops(), no_init_weights():
        yield


def fill(model: PreTrainedModel, tensors: Tensors, *, tied: Mapping[str, str]) -> None:
    """Give a skeleton its tensors: parameters frozen and not copied, buffers copied (a model may write to them).

    Args:
        model: From `build_skeleton`, cut to depth or not.
        tensors: By the model's own names; must hold every parameter and buffer of the model.
        tied: Name to the name that it shares its parameter with.

    Raises:
        ModelError: If a tensor is missing, unknown or mis-shaped.
    """
    wanted = {name: (tensor, kind) for name, tensor, kind in model_tensors(model)}
    _check_names(model, set(wanted), set(tensors))
    parameters: dict[str, nn.Parameter] = {}
    for name, (empty, kind) in wanted.items():
        tensor = tensors[name]
        if tensor.shape != empty.shape:
            found = f"{name!r} is {tuple(tensor.shape)}, the config says {tuple(empty.shape)}"
            raise ModelError(f"cannot fill a {type(model).__name__}", found, "the tensors belong to another model")
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        if kind == "parameter":
            shared = tied.get(name, name)
            if shared not in parameters:
                parameters[shared] = nn.Parameter(tensors.get(shared, tensor).detach(), requires_grad=False)
            owner._parameters[leaf] = parameters[shared]
        elif kind == "buffer":
            owner._buffers[leaf] = tensor.detach().clone()
        else:
            setattr(owner, leaf, tensor.detach().clone())
    _keep_only_true_ties(model)


def _check_names(model: nn.Module, wanted: set[str], given: set[str]) -> None:
    missing, unknown = sorted(wanted - given), sorted(given - wanted)
    if missing or unknown:
        found = [f"missing: {shorten(missing, 3)}"] if missing else []
        found += [f"unknown: {shorten(unknown, 3)}"] if unknown else []
        remedy = "the tensors belong to another model or transformers version"
        raise ModelError(f"cannot fill a {type(model).__name__}", "; ".join(found), remedy)


def _keep_only_true_ties(model: PreTrainedModel) -> None:
    # The class declares ties from its config; a checkpoint with two different matrices is loaded untied, and a shallow
    # model lacks some names. A later tie_weights() must not undo the one or stumble over the other.
    declared = getattr(model, "all_tied_weights_keys", None)
    if declared:
        own = dict(model.named_parameters(remove_duplicate=False))
        for target, source in list(declared.items()):
            if own.get(target) is None or own.get(target) is not own.get(source):
                del declared[target]
