"""What passes between rooms?

Frozen values (plans, updates, reports), arithmetic on named tensors, seeds, errors, and safe writing of files. Nothing
here knows of models, data, Flower or configs.

To add one more value: a frozen dataclass in `values.py`, its JSON form there too, a line in `__all__`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedpeat.core.errors import (
    ConfigError,
    DataError,
    EngineError,
    FedPeatError,
    ModelError,
    PeftError,
    StorageError,
    UpdateRefused,
    nearest,
    shorten,
)
from fedpeat.core.lock import locked
from fedpeat.core.metrics import METRICS, Metric
from fedpeat.core.seeds import seed_for
from fedpeat.core.storage import (
    content_hash,
    read_json,
    read_tensors,
    write_bytes,
    write_json,
    write_tensors,
    write_text,
)

if TYPE_CHECKING:
    from fedpeat.core.layout import (
        EMULATOR,
        EXTRA,
        FOLD,
        Layout,
        LoraPair,
        Part,
        at_rank,
        product,
        rank_in,
        with_prefix,
        without_prefix,
    )
    from fedpeat.core.memory import peak_gpu_mib, peak_rss_mib
    from fedpeat.core.tree import (
        Tensors,
        add,
        all_finite,
        check_like,
        clip,
        count_bytes,
        digest,
        norm,
        subtract,
        zeros_like,
    )
    from fedpeat.core.values import (
        ClientFailure,
        ClientUpdate,
        DevicePlan,
        Evaluation,
        GlobalState,
        RoundPlan,
        RoundReport,
        RunState,
    )

_WITH_TORCH = ("layout", "memory", "tree", "values")
"""Modules that are loaded when something of theirs is asked for: programs that only watch over others have no torch."""

__all__ = [
    "EMULATOR",
    "EXTRA",
    "FOLD",
    "METRICS",
    "ClientFailure",
    "ClientUpdate",
    "ConfigError",
    "DataError",
    "DevicePlan",
    "EngineError",
    "Evaluation",
    "FedPeatError",
    "GlobalState",
    "Layout",
    "LoraPair",
    "Metric",
    "ModelError",
    "Part",
    "PeftError",
    "RoundPlan",
    "RoundReport",
    "RunState",
    "StorageError",
    "Tensors",
    "UpdateRefused",
    "add",
    "all_finite",
    "at_rank",
    "check_like",
    "clip",
    "content_hash",
    "count_bytes",
    "digest",
    "locked",
    "nearest",
    "norm",
    "peak_gpu_mib",
    "peak_rss_mib",
    "product",
    "rank_in",
    "read_json",
    "read_tensors",
    "seed_for",
    "shorten",
    "subtract",
    "with_prefix",
    "without_prefix",
    "write_bytes",
    "write_json",
    "write_tensors",
    "write_text",
    "zeros_like",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in (import_module(f"fedpeat.core.{part}") for part in _WITH_TORCH):
            if hasattr(module, name):
                return globals().setdefault(name, getattr(module, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
