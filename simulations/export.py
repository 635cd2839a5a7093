"""What a run leaves to others: the plugged-in model and its PEFT adapter, in Hugging Face layout."""

from dataclasses import replace
from pathlib import Path

from fedpeat.core import GlobalState
from fedpeat.models import save_model
from fedpeat.peft import export_adapter, merged_model
from simulations.compose import Composed


def export(composed: Composed, state: GlobalState, folder: Path) -> dict[str, str]:
    """Write the plug-in model tuned to `state`.

    `folder/adapter` is a PEFT adapter on the full model (where the method has one), `folder/model` the full model with
    the tuning merged into its weights; `AutoModelForCausalLM` and `PeftModel.from_pretrained` load them.

    Returns:
        The folders written, by `adapter` and `model`.

    Raises:
        StorageError: If the disk is full.
    """
    full = composed.federation.plug_in(state)
    written: dict[str, str] = {}
    if export_adapter(full, folder / "adapter", composed.loaded.name):
        written["adapter"] = str(folder / "adapter")
    merged = merged_model(full)
    if merged is not None:
        save_model(replace(composed.loaded, model=merged), folder / "model")
        written["model"] = str(folder / "model")
    return written
