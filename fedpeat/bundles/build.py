"""A device's model from a bundle and nothing else."""

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from fedpeat.bundles.bundle import Bundle
from fedpeat.bundles.manifest import TOKENIZER_FOLDER
from fedpeat.core import StorageError
from fedpeat.emulators import EmulatedModel, put_together
from fedpeat.models import load_tokenizer


def build_emulated(bundle: Bundle, *, device: str | torch.device = "cpu") -> EmulatedModel:
    """Build a device's model from a bundle and nothing else.

    On a CPU, parameters are views of the bundle's mapped files: processes that build from one bundle share its memory
    as long as they only read.

    Args:
        bundle: From `open_bundle`.
        device: Where the model goes.

    Raises:
        ModelError: If its model class is neither transformers' own nor registered, or the tensors do not fit it.
        StorageError: If its files cannot be read.
    """
    return put_together(
        bundle.manifest["model"],
        bundle.stack,
        bundle.positions,
        _read(bundle, device),
        aliases=bundle.manifest["aliases"],
        asked=f"cannot build from bundle {bundle.folder}",
    )


def _read(bundle: Bundle, device: str | torch.device) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name in bundle.manifest["files"]:
        if name.endswith(".safetensors") and "/" not in name:
            try:
                tensors |= load_file(bundle.folder / name, device=str(device))
            except (OSError, SafetensorError) as error:
                remedy = "fetch the bundle again, or write it anew"
                raise StorageError(f"cannot read {bundle.folder / name}", str(error), remedy) from error
    return tensors


def bundle_tokenizer(bundle: Bundle) -> PreTrainedTokenizerBase:
    """Load the tokenizer that came with a bundle.

    Raises:
        ModelError: If the bundle has none.
    """
    return load_tokenizer(bundle.folder / TOKENIZER_FOLDER)
