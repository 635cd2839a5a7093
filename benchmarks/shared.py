"""What two workers take for one large emulator: mapped from the bundle, or a private copy each.

`pss` counts a page that n processes share as 1/n; their sum over processes is what the machine really gives. The driver
maps the same files, so it carries a third of them.
"""

import shutil
from pathlib import Path
from typing import Any

from benchmarks.clients import copier
from benchmarks.processes import fresh, memory
from benchmarks.samples import Aim, Section
from benchmarks.stage import Watch, run_folder, set_up, settings_of
from fedpeat.client.app import app as client_app
from fedpeat.models import load_tokenizer, locate_model
from simulations import engines

COLUMNS = ("workers hold", "process", "RSS MiB", "PSS MiB", "private MiB")


def measure(folder: Path, *, smoke: bool) -> Section:
    """Measure both ways of holding the frozen weights."""
    width, blocks = (64, 6) if smoke else (1024, 9)
    model = folder / f"llama-{width}-{blocks}"
    frozen = fresh(write_model, model, width, blocks)
    rows = []
    sums = {}
    for kind in ("a shared map",) if smoke else ("a shared map", "a private copy"):
        found = fresh(one, folder, str(model), blocks, kind)
        rows += found
        workers = [row for row in found if row["process"] != "driver"]
        sums[kind] = sum(row["PSS MiB"] for row in workers)
        rows.append({"workers hold": kind, "process": "both workers", "PSS MiB": sums[kind]})
    shutil.rmtree(model)
    saved = sums["a private copy"] - sums["a shared map"] if len(sums) == 2 else None
    facts = {"frozen_mib": frozen, "saved_mib": saved}
    wanted = Aim("MiB of PSS saved by sharing, two workers", saved, at_least=frozen)
    return Section(f"Memory of two workers with {frozen:.0f} MiB of weights", COLUMNS, rows, [wanted], facts)


def write_model(folder: Path, width: int, blocks: int) -> float:
    """Write a random Llama with the embedded model's tokenizer; return MiB of a split 2 + 4 of the rest + 2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(locate_model("tiny_docs"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {name: parameter.numel() * 4 / 2**20 for name, parameter in model.named_parameters()}
    block = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    return sum(sizes.values()) - block * (blocks - _kept(blocks) - 4)


def _kept(blocks: int) -> int:
    return min(4, blocks - 5)


def one(folder: Path, model: str, blocks: int, kind: str) -> list[dict[str, Any]]:
    """Return memory of both workers and the driver after a round in which both trained."""
    settings = settings_of(
        folder,
        "model=hf",
        f"model.name={model}",
        f"emulator.kept_blocks={_kept(blocks)}",
        "rounds=2",
        "client.local_steps=1",
        "client.batch_size=1",
        "data.block_size=32",
        "evaluation.max_rows=1",
        clients=4,
        rows=1,
    )
    rows: list[dict[str, Any]] = []

    def look(report: Any) -> None:
        if report.round == 1:
            workers = sorted({int(client["process"]) for client in report.clients.values()})
            names = {**{pid: f"worker {number}" for number, pid in enumerate(workers, 1)}, "self": "driver"}
            for pid, name in names.items():
                found = memory(pid)
                sizes = {"RSS MiB": found["rss"], "PSS MiB": found["pss"], "private MiB": found["private"]}
                rows.append({"workers hold": kind, "process": name, **sizes})

    with run_folder(folder) as run:
        stage = set_up(settings, engine=engines.ray(workers=2), folder=run)
        app = copier if kind == "a private copy" else client_app
        stage.run(Watch(on_finish=look), client_app=app, folder=run)
    return rows
