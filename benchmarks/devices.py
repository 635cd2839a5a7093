"""What tuning costs a device: time, memory and bytes, beside full fine-tuning and LoRA on the whole model.

usage: python benchmarks/devices.py [--shape SHAPE] [--device DEVICE] [--threads N] [--batch N] [--tokens N] [--steps N]
                                    [--small] [--out FILE] [--folder FOLDER]

A model of that shape with random weights, random rows, fp32, AdamW; dropout is off, so that hidden states can be kept.
Each measurement has a process of its own; the list of rows is gone through twice, the second time backwards, so that a
machine that grows slower does so for all.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Run as a file, Python would look for our modules in this folder: look in the one above.
_ROOT = str(Path(__file__).resolve().parent.parent)
sys.path[:] = [_ROOT, *(entry for entry in sys.path if entry not in {_ROOT, str(Path(__file__).resolve().parent)})]

if TYPE_CHECKING:
    from benchmarks.samples import Section
    from benchmarks.tuning import Row, Sizes

Found = Mapping[str, Sequence[Mapping[str, Any]]]
"""By row, what its processes found, one a pass; only the first has `counted`."""

_GPT2 = {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_NO_TOKENS = {"bos_token_id": 0, "eos_token_id": 0}
_OPT = {"model_type": "opt", "dropout": 0.0, "attention_dropout": 0.0}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {**_GPT2, "n_layer": 9, "n_embd": 64, "n_head": 2, "vocab_size": 256, **_NO_TOKENS},
    "gpt2-medium": {**_GPT2, "n_layer": 24, "n_embd": 1024, "n_head": 16},
    "gpt2-xl": {**_GPT2, "n_layer": 48, "n_embd": 1600, "n_head": 25},
    "opt-1.3b": {
        **_OPT,
        "num_hidden_layers": 24,
        "hidden_size": 2048,
        "word_embed_proj_dim": 2048,
        "ffn_dim": 8192,
        "num_attention_heads": 32,
    },
}

REFERENCE = {"gpt2-xl": (6.5, 5.6)}
"""Times as fast, and times less memory, than full fine-tuning: Offsite-Tuning, Xiao et al. 2023, arXiv:2302.04870."""

COLUMNS = (
    "what",
    "s/step",
    "quartiles",
    "times as fast",
    "by pass",
    "peak MiB",
    "times less",
    "counted MiB",
    "times less, counted",
    "receives MiB",
    "sends MiB/round",
)

BRINGS = {
    "LoRA instead of all weights": ("lora", "full"),
    "an emulator with fewer blocks": ("adapter-lora", "lora"),
    "no gradients for frozen weights": ("adapter-lora", "all-gradients"),
    "backward no deeper than the lowest trained block": ("end-lora", "adapter-lora"),
    "hidden states kept": ("end-lora-kept", "end-lora"),
    "emulator in 8 bits": ("int8-lora", "adapter-lora"),
}
"""What a freedom brings: the row that takes it, and the row that does not."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table; return 0."""
    asked = _parse(arguments)
    from benchmarks.processes import fresh, quiet

    quiet()
    # A process that asked the CUDA runtime for GPUs cannot be forked to use them: if an import asks, then through NVML.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    from rich.console import Console
    from transformers.utils.logging import set_verbosity_error

    from benchmarks.simulation import machine
    from benchmarks.tables import show
    from benchmarks.tuning import Sizes
    from fedpeat.client.app import resolve_device

    set_verbosity_error()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    device = fresh(resolve_device, asked.device)
    sizes = Sizes(SHAPES[asked.shape], asked.batch, asked.tokens, asked.steps, asked.threads, device)
    about, began = machine(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fedpeat-benchmark-", dir=asked.folder, ignore_cleanup_errors=True) as name:
        measured = measure(Path(name), asked.shape, sizes, lambda text: console.print(text, style="dim"))
    sections = [section.to_json() for section in measured]
    for section in sections:
        show(console, section)
    console.print(f"{time.perf_counter() - began:.0f} s on {about['cpu']}, {about['cores']} cores")
    if asked.out:
        result = {"shape": asked.shape, "sizes": vars(sizes), "machine": about, "sections": sections}
        asked.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/devices.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="gpt2-medium")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--batch", type=int, default=4, help="rows a step")
    parser.add_argument("--tokens", type=int, default=128, help="of a row")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process, after one that is not")
    parser.add_argument("--small", action="store_true", help="everything in a minimal form: does it run?")
    parser.add_argument("--out", type=Path, help="also write everything as JSON")
    parser.add_argument("--folder", type=Path, help="where scratch files go; a temporary folder by default")
    asked = parser.parse_args(arguments)
    if asked.small:
        asked.shape, asked.batch, asked.tokens, asked.steps, asked.threads = "tiny", 2, 16, 2, 1
    if min(asked.threads, asked.batch, asked.steps) < 1 or asked.tokens < 2:
        parser.error("threads, batch and steps are 1 or more, tokens 2 or more")
    return asked


def rows_of() -> Sequence["Row"]:
    """Return what is measured; the first is what the others are compared with."""
    from benchmarks.tuning import FULL, LORA, Row

    return [
        Row("bare", "full fine-tuning, a bare loop", "whole", FULL, bare=True),
        Row("full", "full fine-tuning", "whole", FULL),
        Row("lora", "LoRA, whole model", "whole", LORA),
        Row("adapter-full", "emulated 2+2, adapter blocks", "ends", FULL),
        Row("adapter-lora", "emulated 2+2, LoRA", "ends", LORA),
        Row("all-gradients", "same, gradients of frozen weights too", "ends", LORA, all_gradients=True),
        Row("end-lora", "emulated 0+4, LoRA", "last", LORA),
        Row("end-lora-kept", "same, hidden states kept", "last", LORA, prefix=True),
        Row("int8-lora", "emulated 2+2 in int8, LoRA", "int8", LORA),
    ]


def measure(folder: Path, shape: str, sizes: "Sizes", note: Callable[[str], None]) -> list["Section"]:
    """Go through the rows twice; return what they cost, what each freedom brings, and what memory is counted."""
    from benchmarks.processes import fresh
    from benchmarks.samples import Section
    from benchmarks.tuning import measure as one
    from benchmarks.tuning import write_bundles

    note(f"writing bundles of {shape} ...")
    bundles = fresh(write_bundles, folder / "bundles", sizes)
    rows = rows_of()
    found: dict[str, list[dict[str, Any]]] = {row.key: [] for row in rows}
    for number, order in enumerate((rows, rows[::-1]), 1):
        for row in order:
            value = fresh(one, row, folder, bundles[row.bundle]["folder"], sizes, count=number == 1)
            found[row.key].append(value)
            note(f"pass {number}: {row.what}: {statistics.median(value['seconds']):.3g} s/step")
    brings = [{"what": name, **brought(found, *pair)} for name, pair in BRINGS.items()]
    kinds = [{"what": row.what, **_counted(found, row.key)} for row in rows if not row.bare]
    facts = {
        "blocks": {name: bundle["blocks"] for name, bundle in bundles.items()},
        "hidden states kept, MiB": found["end-lora-kept"][0]["kept MiB"],
    }
    return [
        costs(shape, sizes, {row.key: line(row, found, bundles[row.bundle]["mib"]) for row in rows}),
        Section("What each freedom brings", tuple(brings[0]), brings, facts=facts),
        Section("Memory as counted, MiB", tuple(kinds[0]), kinds),
    ]


def costs(shape: str, sizes: "Sizes", lines: Mapping[str, Mapping[str, Any]]) -> "Section":
    """Return the table of all rows."""
    from benchmarks.samples import Aim, Section

    fast, small = REFERENCE.get(shape, (None, None))
    best = lines["adapter-lora"]
    aims = [
        Aim("emulated, LoRA: steps/s over full fine-tuning", best["times as fast"], at_least=fast),
        Aim("emulated, LoRA: full fine-tuning's memory over it", best["times less"], at_least=small),
    ]
    where = "of what torch allocates on the GPU" if sizes.device == "cuda" else "of resident memory"
    title = f"What tuning {shape} costs a device, {sizes.batch} x {sizes.tokens} tokens a step (peak {where})"
    facts = {"threads": sizes.threads, "steps of a process": sizes.steps}
    return Section(title, COLUMNS, list(lines.values()), aims, facts)


def line(row: "Row", found: Found, received: float) -> dict[str, Any]:
    """Return a table row; `times ...` are to full fine-tuning in a bare loop."""
    from benchmarks.samples import Sample

    seconds = Sample.of([second for value in found[row.key] for second in value["seconds"]])
    passes = [speedup([base], [own]) for base, own in zip(found["bare"], found[row.key], strict=True)]
    counted = sum(_counted(found, row.key).values())
    return {
        "what": row.what,
        "s/step": seconds.median,
        "quartiles": [seconds.low, seconds.high],
        "times as fast": speedup(found["bare"], found[row.key]),
        "by pass": [min(passes), max(passes)],
        "peak MiB": _peak(found, row.key),
        "times less": _peak(found, "bare") / _peak(found, row.key),
        "counted MiB": counted,
        "times less, counted": sum(_counted(found, "bare").values()) / counted,
        "receives MiB": received,
        "sends MiB/round": None if row.bare else found[row.key][0]["sends MiB"],
    }


def brought(found: Found, mine: str, other: str) -> dict[str, float]:
    """Return how many times as fast the first row is, and how much less memory it takes than the second."""
    return {
        "times as fast": speedup(found[other], found[mine]),
        "MiB less": _peak(found, other) - _peak(found, mine),
        "counted MiB less": sum(_counted(found, other).values()) - sum(_counted(found, mine).values()),
    }


def speedup(over: Sequence[Mapping[str, Any]], under: Sequence[Mapping[str, Any]]) -> float:
    """Return the ratio of two rows' median step times, added up over passes: a steady drift cancels."""
    one, other = (sum(statistics.median(value["seconds"]) for value in values) for values in (over, under))
    return one / other


def _peak(found: Found, key: str) -> float:
    return statistics.median(value["peak MiB"] for value in found[key])


def _counted(found: Found, key: str) -> Mapping[str, float]:
    """Return the counted memory by kind, MiB; the bare loop trains what the client does, and needs the same."""
    return found["full" if key == "bare" else key][0]["counted"]


if __name__ == "__main__":
    sys.exit(main())
