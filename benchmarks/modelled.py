"""What a visit is modelled to need of a device's memory, beside what it is measured to take.

usage: python benchmarks/modelled.py [--small] [--threads N] [--out FILE] [--folder FOLDER]

Models of three sizes with random weights, fp32, AdamW, by three ways to tune. Modelled by `fedpeat.client.needs` in one
process; measured in a fresh one, which works on a message as a client does: the peak of resident memory minus what was
resident before it opened its bundle (Linux only).
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Run as a file, Python would look for our modules in this folder: look in the one above.
_ROOT = str(Path(__file__).resolve().parent.parent)
sys.path[:] = [_ROOT, *(entry for entry in sys.path if entry not in {_ROOT, str(Path(__file__).resolve().parent)})]

if TYPE_CHECKING:
    from benchmarks.samples import Section
    from benchmarks.tuning import Row, Sizes

_GPT2 = {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_NO_TOKENS = {"bos_token_id": 0, "eos_token_id": 0}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {**_GPT2, "n_layer": 9, "n_embd": 64, "n_head": 2, "vocab_size": 256, **_NO_TOKENS},
    "small": {**_GPT2, "n_layer": 8, "n_embd": 384, "n_head": 6, "vocab_size": 16384, **_NO_TOKENS},
    "medium": {**_GPT2, "n_layer": 12, "n_embd": 512, "n_head": 8, "vocab_size": 32768, **_NO_TOKENS},
    "llama": {
        "model_type": "llama",
        "num_hidden_layers": 10,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 24000,
        **_NO_TOKENS,
    },
    "gpt2": {**_GPT2, "n_layer": 12, "n_embd": 768, "n_head": 12},
}
BATCH, TOKENS = 4, 128
COLUMNS = ("model", "what", "weights MiB", "modelled MiB", "measured MiB", "modelled / measured")


def main(arguments: Sequence[str] | None = None) -> int:
    """Model and measure, print a table; return 0."""
    parser = argparse.ArgumentParser(prog="benchmarks/modelled.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="everything in a minimal form: does it run?")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--out", type=Path, help="also write everything as JSON")
    parser.add_argument("--folder", type=Path, help="where scratch files go; a temporary folder by default")
    asked = parser.parse_args(arguments)
    from benchmarks.processes import quiet

    quiet()
    from rich.console import Console
    from transformers.utils.logging import set_verbosity_error

    from benchmarks.tables import show

    set_verbosity_error()
    shapes = ("tiny",) if asked.small else ("small", "medium", "llama", "gpt2")
    with tempfile.TemporaryDirectory(prefix="fedpeat-benchmark-", dir=asked.folder, ignore_cleanup_errors=True) as name:
        section = measure(Path(name), shapes, threads=asked.threads).to_json()
    show(Console(highlight=False, width=None if sys.stdout.isatty() else 120), section)
    if asked.out:
        asked.out.write_text(json.dumps({"sections": [section]}, indent=2) + "\n", encoding="utf-8")
    return 0


def rows_of() -> Sequence["Row"]:
    """Return the ways to tune."""
    from benchmarks.tuning import FULL, LORA, Row

    return [
        Row("emulated", "emulated 2+2, LoRA", "ends", LORA),
        Row("lora", "LoRA, whole model", "whole", LORA),
        Row("full", "full fine-tuning", "whole", FULL),
    ]


def measure(folder: Path, shapes: Sequence[str], *, threads: int) -> "Section":
    """Return the table of all shapes and ways."""
    from benchmarks.processes import fresh
    from benchmarks.samples import Aim, Section
    from benchmarks.tuning import Sizes, write_bundles

    lines, aims = [], []
    for shape in shapes:
        batch, tokens = (2, 16) if shape == "tiny" else (BATCH, TOKENS)
        sizes = Sizes(SHAPES[shape], batch, tokens, 3, threads, "cpu")
        bundles = fresh(write_bundles, folder / shape, sizes)
        for row in rows_of():
            place = bundles[row.bundle]["folder"]
            weights, modelled = fresh(model_one, row, place, sizes)
            measured = fresh(measure_one, row, place, sizes)
            found = (shape, row.what, weights, modelled, measured, modelled / measured)
            lines.append(dict(zip(COLUMNS, found, strict=True)))
            aims.append(Aim(f"{shape}, {row.what}: modelled / measured", modelled / measured, 0.85, 1.15))
    title = f"Memory of a visit, {BATCH} x {TOKENS} tokens a step"
    return Section(title, COLUMNS, lines, aims if "tiny" not in shapes else [])


def model_one(row: "Row", bundle: Path, sizes: "Sizes") -> tuple[float, float]:
    """Return the weights and the memory that a visit is modelled to need, MiB."""
    import torch

    from benchmarks.tuning import MIB, attached, random_rows
    from fedpeat.bundles import build_emulated, open_bundle
    from fedpeat.client.needs import needs

    torch.set_num_threads(sizes.threads)
    opened = open_bundle(bundle, verify=False)
    tuned = attached(row, build_emulated(opened, device="cpu"))
    found = needs(tuned, random_rows(opened, sizes), sizes.spec(prefix=False))
    return found.weights / MIB, found.memory_bytes / MIB


def measure_one(row: "Row", bundle: Path, sizes: "Sizes") -> float:
    """Work on a message as a client does; return the peak of resident memory over what was there before, MiB."""
    import torch

    from benchmarks.processes import peak, start_peak
    from benchmarks.tuning import SEED, attached, private, random_rows
    from fedpeat.bundles import build_emulated, open_bundle
    from fedpeat.client import Store, Task, work
    from fedpeat.wire import read_arrays, to_arrays

    torch.set_num_threads(sizes.threads)
    opened = open_bundle(bundle, verify=False)
    rows = random_rows(opened, sizes)
    before = start_peak()
    tuned = attached(row, private(build_emulated(opened, device="cpu")))
    came = to_arrays(tuned.initial)
    start_peak()  # what opening took for a moment is not training's
    result = work(
        tuned,
        rows,
        task=Task("device", sizes.steps, start_step=0, total_steps=sizes.steps, seed=SEED),
        spec=sizes.spec(prefix=False),
        tensors=read_arrays(came),
        extras={},
        store=Store(None, "device"),
    )
    reply = to_arrays(result.delta)
    assert len(reply) == len(came)  # noqa: S101 (both are there until now)
    return peak() - before


if __name__ == "__main__":
    sys.exit(main())
