"""A causal language model and its tokenizer: loaded from safetensors, saved in the Hugging Face layout."""

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as hf_logging

from fedpeat.core import ConfigError, ModelError, StorageError, nearest, shorten
from fedpeat.models.build import ATTENTIONS, DTYPES, check_plain, describe

PACKAGED = {"tiny_docs": Path(__file__).parent / "tiny_docs"}
"""Models that come with this package, by name."""

_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_CONVERT = "convert it with model.save_pretrained(folder) (transformers writes safetensors)"


@dataclass(frozen=True)
class LoadedModel:
    """A full model.

    Attributes:
        model: In eval mode, every parameter frozen: what trains is `fedpeat.peft`'s to say.
        tokenizer: With a padding token; None where a model of one's own has none.
        name: The hub id or folder it was loaded by.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str


def load_model(
    name: str | Path,
    *,
    dtype: str = "float32",
    attention: str = "sdpa",
    revision: str | None = None,
    device: str | torch.device = "cpu",
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        name: A hub id, a local folder in the Hugging Face layout, or the name of a packaged model (`tiny_docs`).
        dtype: "float32", "bfloat16" or "float16" (or "fp32", "bf16", "fp16").
        attention: "sdpa" (a family that lacks it gets "eager"), "eager", or another of transformers' implementations.
        revision: Branch, tag or commit on the hub.
        device: Where the model goes.

    Raises:
        ConfigError: If dtype or attention is unknown.
        ModelError: If there is no such model, it is not causal, its weights are pickled or incomplete, or it has no
            tokenizer.
    """
    dtype = _SHORT_DTYPES.get(dtype, dtype)
    if dtype not in DTYPES:
        raise ConfigError(f"cannot load in model.dtype={dtype!r}", "no such type", nearest(dtype, DTYPES))
    if attention not in ATTENTIONS:
        raise ConfigError(
            f"cannot load with model.attention={attention!r}", "no such choice", nearest(attention, ATTENTIONS)
        )
    place = locate_model(str(name))
    with _quiet():
        _check_is_causal(place, name, revision)
        model = _load_weights(place, name, dtype=dtype, attention=attention, revision=revision)
        tokenizer = load_tokenizer(place, revision=revision)
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.requires_grad_(False)
    return LoadedModel(model.eval().to(device), tokenizer, str(name))  # type: ignore[arg-type]


def locate_model(name: str) -> str:
    """Return the folder or hub id that `name` stands for.

    Args:
        name: A hub id, a local folder, or the name of a packaged model.

    Raises:
        ModelError: If it looks like a folder and is none, or the folder lacks a config or safetensors.
    """
    folder = PACKAGED.get(name, Path(name).expanduser())
    if not folder.is_dir():
        looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or name in PACKAGED
        if looks_local or folder.exists():
            remedy = "give a hub id (owner/name) or a folder with config.json, tokenizer and model.safetensors"
            raise ModelError(f"cannot load model {name!r}", f"there is no folder {folder}", remedy)
        return name
    asked = f"cannot load model {name!r}"
    if not (folder / "config.json").is_file():
        remedy = "point to the folder that model.save_pretrained wrote"
        raise ModelError(asked, "the folder has no config.json", remedy)
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
        if pickles:
            found = f"its weights are pickled ({shorten(pickles, 3)}), and pickle can run any code"
            raise ModelError(asked, found, _CONVERT)
        raise ModelError(asked, "the folder has no *.safetensors", "save the weights as safetensors into it")
    return str(folder)


def _check_is_causal(place: str, name: str | Path, revision: str | None) -> None:
    with _told(name, "check the name, the network and, for a gated model, your access"):
        config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
    asked, remedy = f"cannot load model {str(name)!r}", "choose a decoder-only (causal) language model"
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)  # type: ignore[arg-type]
    if known is None or getattr(config, "is_encoder_decoder", False):
        raise ModelError(asked, f"model type {config.model_type!r} is not a causal language model", remedy)
    if getattr(config, "is_decoder", True) is False and known.__name__ not in (config.architectures or []):
        found = f"it is an encoder ({shorten(config.architectures or [config.model_type], 2)}, is_decoder=False)"
        raise ModelError(asked, found, remedy)


def _load_weights(place: str, name: str | Path, *, dtype: str, attention: str, revision: str | None) -> PreTrainedModel:
    with _told(name, f"it must be readable safetensors; pickled weights are refused: {_CONVERT}"):
        model, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            place,
            revision=revision,
            dtype=DTYPES[dtype],
            # None lets transformers take sdpa where the family supports it, and eager where not (Gemma-2).
            attn_implementation=None if attention == "sdpa" else attention,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    for key, what in (("missing_keys", "are missing"), ("mismatched_keys", "have another shape than the config says")):
        wrong = sorted(str(item) for item in report.get(key, ()))
        if wrong:
            found = f"{len(wrong)} tensors {what}: {shorten(wrong, 3)}"
            raise ModelError(f"cannot load model {str(name)!r}", found, "restore the model's files")
    return model


def load_tokenizer(place: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer by hub id or folder, and give it a padding token if it has none (its end of text).

    Raises:
        ModelError: If there is none.
    """
    with _quiet(), _told(place, "save the tokenizer into the model's folder (tokenizer.save_pretrained)", "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(place), revision=revision, trust_remote_code=False)
        if len(tokenizer) == 0:
            raise ValueError("there are no tokenizer files")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
    return tokenizer


def save_model(loaded: LoadedModel, folder: str | Path) -> Path:
    """Save a full model and its tokenizer so that `AutoModelForCausalLM` and `AutoTokenizer` load them.

    Args:
        loaded: For example a full model with a tuned adapter plugged in.
        folder: Made if need be; files of the same names are replaced, each at once.

    Raises:
        ModelError: If the model has layers attached (merge or remove them first).
        StorageError: If the disk is full or the folder cannot be written.
    """
    folder = Path(folder)
    check_plain(loaded.model, describe(loaded.model), what="save the model")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as partial, _quiet():
            loaded.model.save_pretrained(partial)
            if loaded.tokenizer is not None:
                loaded.tokenizer.save_pretrained(partial)
            for path in sorted(Path(partial).iterdir()):
                path.replace(folder / path.name)
    except OSError as error:
        remedy = "free some space or choose another folder"
        raise StorageError(f"cannot save the model to {folder}", str(error), remedy) from error
    return folder


@contextlib.contextmanager
def _told(name: str | Path, remedy: str, what: str = "model") -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        found = " ".join(lines)[:400] or type(error).__name__
        if "trust_remote_code" in str(error):
            found, remedy = "it needs code of its own (trust_remote_code)", "such code is never run: use another model"
        raise ModelError(f"cannot load {what} {str(name)!r}", found, remedy) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars, reports and conversion service out of a run."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    setting = os.environ.get("DISABLE_SAFETENSORS_CONVERSION")
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
        if setting is None:
            del os.environ["DISABLE_SAFETENSORS_CONVERSION"]
        else:
            os.environ["DISABLE_SAFETENSORS_CONVERSION"] = setting
