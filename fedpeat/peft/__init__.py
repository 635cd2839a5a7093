"""Which parameters train and travel?

The only answer to that, and the only door to HF peft. Words: HF calls the tensors of one LoRA an "adapter"; here the
adapter is the transformer blocks that a device tunes, and LoRA and its kin are PEFT methods inside them.

To add one more: a kind in `attach._KEYWORDS` and its branch in `attach.attach`; a new type of HF peft needs nothing but
a line in `methods.REFUSED` or `methods.CHANGES_OUTPUT` if it cannot be used or is not an identity at the start.
"""

from fedpeat.peft.attach import attach
from fedpeat.peft.export import export_adapter
from fedpeat.peft.merge import merged_model
from fedpeat.peft.methods import MethodSupport, supported
from fedpeat.peft.tuned import Tuned

__all__ = ["MethodSupport", "Tuned", "attach", "export_adapter", "merged_model", "supported"]
