"""What each strategy costs and can do, in one table: counted where it can be counted, else as its recipe states."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from fedpeat.core import ClientUpdate, GlobalState, count_bytes, seed_for
from fedpeat.models import find_blocks, load_model, make_split
from fedpeat.peft import Tuned, attach
from simulations.building import built
from strategies import Recipe, Situation, aggregate, start
from strategies.aggregate import seen_by_recipe
from strategies.privacy import why_not_private
from strategies.traffic import tensors_down, tensors_up

CLIENTS, ROUNDS = 15, 3
EXAMPLES: Mapping[str, Mapping[str, Any]] = {"flower": {"name": "FedMedian"}}
"""What a strategy that cannot do without a choice is tabled with."""


@dataclass(frozen=True)
class Row:
    """One strategy in the table.

    Attributes:
        name: As in `conf/strategy/`.
        recipe: What its builder makes with the defaults of its YAML.
        down: Bytes to a client in a round, relative to plain LoRA.
        up: Bytes from a client in a round, relative to plain LoRA.
    """

    name: str
    recipe: Recipe
    down: float
    up: float


def recipes(conf_folder: Path) -> Iterator[tuple[str, Recipe]]:
    """Yield every option of the strategy group with its recipe."""
    for path in sorted((conf_folder / "strategy").glob("*.yaml")):
        node = yaml.safe_load(path.read_text(encoding="utf-8"))
        yield path.stem, built({**node, **EXAMPLES.get(path.stem, {})})


def strategy_rows(conf_folder: Path) -> list[Row]:
    """Return a row a strategy, its bytes counted in a federation of random updates on the embedded model's adapter."""
    plain = count_bytes(_tuned("lora").initial)
    rows = []
    for name, recipe in recipes(conf_folder):
        down, up = traffic(recipe, _tuned("lora_sb" if recipe.facts.needs == "cores" else "lora"))
        rows.append(Row(name, recipe, down / plain, up / plain))
    return rows


@cache
def _tuned(kind: str) -> Tuned:
    loaded = load_model("tiny_docs")
    blocks = find_blocks(loaded.model)
    split = make_split(blocks.count, first=2, last=2, blocks=None)
    method = {"kind": kind, "rank": 8, "alpha": 16}
    sources = range(blocks.count)
    return attach(
        loaded.model, method=method, path=blocks.path, sources=sources, adapter_positions=split.adapter, seed=0
    )


def traffic(recipe: Recipe, tuned: Tuned) -> tuple[float, float]:
    """Return the bytes to and from a client in a round after the first, from what the recipe itself has sent."""
    situation = Situation(1, start(recipe, tuned.initial), tuned.layout, population=CLIENTS)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    down, up = 0, 0
    for number in range(1, ROUNDS + 1):
        situation = replace(situation, round=number)
        half, state = recipe.client(number), situation.state
        like = tensors_up(state.tensors, tuned.layout, half, None)
        updates = [_random(name, like, number, half) for name in [*(f"c{i:02}" for i in range(CLIENTS)), "server"]]
        if recipe.facts.server_takes_part != "needed":
            updates.pop()
        down = count_bytes(tensors_down(recipe, seen_by_recipe(situation), half, None))
        up = count_bytes(updates[0].delta) + count_bytes(updates[0].extras)
        after: GlobalState = aggregate(recipe, situation, updates).state
        situation = replace(situation, state=after)
    return float(down), float(up)


def _random(name: str, like: Mapping[str, torch.Tensor], number: int, half: Mapping[str, Any]) -> ClientUpdate:
    generator = torch.Generator().manual_seed(seed_for(0, "table", name, number))
    delta = {key: 0.01 * torch.randn(tensor.shape, generator=generator) for key, tensor in like.items()}
    metrics = {"train_steps": 5.0, "effective_steps": 5.0, "train_tokens": 640.0, "start_loss": 3.0}
    return ClientUpdate(name, number, delta, 1.0, metrics, extras=delta if half.get("control_variates") else {})


def table_cells(row: Row) -> tuple[str, ...]:
    """Return a row's cells as words."""
    facts = row.recipe.facts
    return (
        f"`{row.name}`",
        facts.exact,
        f"{row.down:.2f} / {row.up:.2f}",
        "yes" if row.recipe.mixes_ranks else "no",
        facts.client_state or "—",
        "yes" if facts.linear else "no",
        "no" if why_not_private(row.recipe) else "yes",
        facts.server_takes_part,
        facts.source,
    )


HEADINGS = (
    "strategy",
    "exact on LoRA",
    "bytes down / up",
    "mixed ranks",
    "client keeps",
    "weighted sum only",
    "differential privacy",
    "server takes part",
    "source",
)
