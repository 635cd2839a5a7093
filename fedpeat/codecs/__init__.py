"""How is a delta changed on its way?

A `Codec` is a value: `encode` makes of a delta the tensors that are sent, `decode` makes a delta of what came, or
refuses it; `start` gives what the client keeps between deltas. Builders (`int8`, `top_k`, ...) take flat keywords. Both
ends build the same codec: a description crosses the wire, never code.

To add one more: a builder beside its kin, described by name and keywords; a line in `BUILDERS` of `described.py` and in
`__all__`; a YAML in `conf/codec/`; a slow twin in `tests/oracles/codecs.py`. `tests/fedpeat/codecs/test_codec.py` runs
the laws of all codecs on it.
"""

from fedpeat.codecs.blocks import int4, int8
from fedpeat.codecs.casts import bf16, fp16, none
from fedpeat.codecs.codec import TINY, Codec, payload
from fedpeat.codecs.described import describe, from_description
from fedpeat.codecs.rotation import drive
from fedpeat.codecs.sparse import top_k, top_k_int8

__all__ = [
    "TINY",
    "Codec",
    "bf16",
    "describe",
    "drive",
    "fp16",
    "from_description",
    "int4",
    "int8",
    "none",
    "payload",
    "top_k",
    "top_k_int8",
]
