"""The model card of the embedded model, written from what pretraining measured."""

import platform
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fedpeat.core import write_text


def write_card(folder: Path, report: Mapping[str, Any]) -> None:
    """Write README.md, the model card, to the model's folder.

    Args:
        folder: Where the model was saved.
        report: What `simulations.pretrain.pretrain` returns.
    """
    recipe, skip = report["recipe"], report["recipe"]["skip"]
    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    text = _CARD.format(
        parameters=report["parameters"] / 1e6,
        depth=recipe["shape"]["num_hidden_layers"],
        shape=recipe["shape"],
        size=size,
        storage=recipe["storage"],
        vocabulary=recipe["vocabulary"],
        libraries=_libraries(report),
        rows=report["rows"],
        row_tokens=recipe["row_tokens"],
        corpus=report["rows"] * recipe["row_tokens"] / 1e6,
        skip=skip,
        middle=skip["last"] - skip["first"] + 1,
        steps=recipe["steps"],
        batch=recipe["batch_size"],
        recipe=recipe,
        seen=report["tokens_seen"] / 1e6,
        epochs=report["tokens_seen"] / (report["rows"] * recipe["row_tokens"]),
        minutes=report["training_seconds"] / 60,
        speed=report["tokens_seen"] / max(report["training_seconds"], 1e-9),
        machine=report["machine"],
        versions=", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers")),
        python=platform.python_version(),
        summary=_summary(report["evaluation"]),
        clients=_by_library(report["evaluation"].get("clients", {})),
        pretrained=_by_library(report["evaluation"].get("held_out", {})),
        tuned=_tuned(report),
    )
    write_text(folder / "README.md", "\n\n".join(map(_wrapped, text.rstrip().split("\n\n"))) + "\n")


def _wrapped(block: str) -> str:
    prose = block[:1] not in {"#", "|", "-"}
    return textwrap.fill(block, 110, break_long_words=False, break_on_hyphens=False) if prose else block


def machine() -> str:
    """Return the kind of machine this is, without its name."""
    system = f"{platform.system()} on {platform.machine()}"
    return f"{system}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else f"{system}, CPU only"


def _libraries(report: Mapping[str, Any]) -> str:
    sizes = sorted(report["characters"].items(), key=lambda item: -item[1])
    rows = ((name, f"{count / 1e6:.2f}") for name, count in sizes)
    return _table(("library", "million characters"), rows)


def _summary(evaluation: Mapping[str, Any]) -> str:
    titles = {"held_out": "libraries pretrained on", "clients": "client libraries"}
    groups = [group for name, group in evaluation.items() if name in titles]
    rows = [
        (label, *(f"{group[key]['perplexity']:,.1f}" for group in groups))
        for label, key in (("**this model**", "model"), ("unigram", "unigram"), ("same shape, untrained", "untrained"))
    ]
    for kept in groups[0]["emulators"] if groups else ():
        label = f"emulator of {kept} middle blocks, as it is"
        rows.append((label, *(f"{group['emulators'][kept]['perplexity']:,.1f}" for group in groups)))
    return _table(("perplexity on held-out modules", *(titles[name] for name in evaluation)), rows)


def _by_library(group: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {told['perplexity']:.1f}" for name, told in group.get("libraries", {}).items()) or "none"


def _tuned(report: Mapping[str, Any]) -> str:
    clients, recipe = report["evaluation"].get("clients", {}), report["recipe"]
    if not clients.get("tuned"):
        return ""
    whole = f"{clients['model']['perplexity']:.1f}"
    rows = [
        (kept, whole, *(f"{told[key]['perplexity']:.1f}" for key in ("emulator", "emulated", "plug_in")))
        for kept, told in clients["tuned"].items()
    ]
    head = ("middle blocks kept", "whole model before", "emulator before", "emulated and tuned", "plug-in")
    return _TUNED.format(skip=recipe["skip"], tuning=recipe["evaluation"]["tuning"], table=_table(head, rows))


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


_CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# tiny_docs

A causal language model of {parameters:.2f} million parameters and {depth} blocks (Llama-shaped), {size:.1f} MiB on disk
with its tokenizer. It was pretrained on docstrings of Python libraries, so that federated, emulator-assisted tuning
can be tried, tested and shown on any machine, without a network. It knows the look of API documentation and little
else: use it to study methods, not to write.

## Data

Docstrings of installed libraries, read from their sources by `fedpeat.data.docstrings.read_docstrings`: those of at
least 100 characters, each text once. A hash of library and module holds about a tenth of the modules out. The rest
make {corpus:.2f} million tokens ({rows:,} rows of {row_tokens}):

{libraries}

The texts belong to those libraries' authors, under their licences; none of them are shipped with the model. The
default clients of a federation are other libraries, and the model saw nothing of them.

## Recipe

`fedpeat pretrain` makes the model anew; `conf/pretrain.yaml` holds every number. In short: a byte-level BPE of
{vocabulary:,} tokens; hidden size {shape[hidden_size]}, {shape[num_attention_heads]} heads, MLP of
{shape[intermediate_size]}, tied embeddings, context {shape[max_position_embeddings]}; {steps:,} steps of
{batch} x {row_tokens} tokens; AdamW, peak learning rate {recipe[learning_rate]}, {recipe[warmup_steps]} steps of
warm-up, then constant, and a cosine over the last {recipe[decay_steps]}; weight decay
{recipe[weight_decay]}; gradients clipped at {recipe[clip_norm]}; weights stored as {storage}.

**Redundancy over depth.** Large models bear the loss of some blocks, and emulators made by dropping blocks rest on
that. A small model gets it by stochastic depth: in {skip[share]:.0%} of the steps only {skip[fewest]} to {skip[most]}
of the {middle} blocks {skip[first]}..{skip[last]} ran, chosen at random; in the others all of them. This is meant to
keep adapters that were tuned around a thinned middle useful around the whole; the table of emulators below shows how
far it does. One such setting was trained to the end, so the card says nothing of what another would give.

Tokens seen: {seen:.1f} million ({epochs:.2f} epochs). Training took {minutes:.0f} minutes ({speed:,.0f} tokens
a second, beside other work on the machine): {machine}, {recipe[workers]} processes of {recipe[threads]} thread each.
Python {python}, {versions}.

## Measured

{summary}

Perplexity is per token of this model's tokenizer, on at most {recipe[evaluation][rows]} rows of {row_tokens} tokens of
each library; the unigram baseline knows the training rows' token frequencies. By library:

- client libraries: {clients}
- libraries pretrained on: {pretrained}

{tuned}
## Limits

English, in the form of docstrings; {vocabulary:,} tokens; a context of {shape[max_position_embeddings]} tokens. What it
says about an API is made up.
"""

_TUNED = """**Tuned through an emulator.** Blocks before {skip[first]} and after {skip[last]} are the adapter. Their own
weights were tuned around an emulator, on modules of all client libraries that are not held out ({tuning[steps]} steps
of {tuning[batch_size]} x {tuning[row_tokens]} tokens, AdamW at {tuning[learning_rate]}), then plugged into the whole
model. Perplexity on the client libraries' held-out modules:

{table}
"""
