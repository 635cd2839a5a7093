"""Where are a model's blocks, and how is it taken apart and put together again?

Any transformers causal language model: loaded from safetensors (`load_model`), its blocks found by structure
(`find_blocks`), divided into adapter and middle (`make_split`), taken apart and put together by canonical name
(`take_apart`, `assemble`, `plug_in`), rebuilt from a description without its files (`describe`, `build_skeleton`,
`keep_blocks`, `fill`), and saved in the Hugging Face layout (`save_model`).

To add one more: a family whose blocks structure alone can find needs nothing. If its blocks depend on one another, add
the config field that says so to `LINKED_BLOCKS` in `depth.py`; if the class is your own, call `register_model_class`.
"""

from fedpeat.models.blocks import BlockStack, find_blocks
from fedpeat.models.build import build_skeleton, check_plain, describe, fill, register_model_class
from fedpeat.models.depth import keep_blocks
from fedpeat.models.load import LoadedModel, load_model, load_tokenizer, locate_model, save_model
from fedpeat.models.names import canonical_name, local_name
from fedpeat.models.parts import Parts, assemble, plug_in, source_of, take_apart
from fedpeat.models.split import Split, make_split
from fedpeat.models.sublayers import SUBLAYERS, linear_layers, sublayers
from fedpeat.models.tensors import model_tensors, tied_names

__all__ = [
    "SUBLAYERS",
    "BlockStack",
    "LoadedModel",
    "Parts",
    "Split",
    "assemble",
    "build_skeleton",
    "canonical_name",
    "check_plain",
    "describe",
    "fill",
    "find_blocks",
    "keep_blocks",
    "linear_layers",
    "load_model",
    "load_tokenizer",
    "local_name",
    "locate_model",
    "make_split",
    "model_tensors",
    "plug_in",
    "register_model_class",
    "save_model",
    "source_of",
    "sublayers",
    "take_apart",
    "tied_names",
]
