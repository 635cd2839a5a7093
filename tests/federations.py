"""Random federations of named tensors, for tests of strategies: no models, no data."""

import torch

from fedpeat.core import ClientUpdate, GlobalState, Layout, LoraPair
from strategies import Situation

SCALING = 2.0
SHAPES = {"m.0": (6, 5), "m.1": (4, 7)}


def make_layout(rank=3, head=False, shapes=None, scaling=SCALING):
    """A layout of LoRA pairs `m.0` (6 x 5) and `m.1` (4 x 7), and a plain tensor `head.weight` if asked for."""
    pairs = tuple(
        LoraPair(name, f"{name}.lora_A.weight", f"{name}.lora_B.weight", scaling, shape)
        for name, shape in (shapes or SHAPES).items()
    )
    return Layout(pairs, ("head.weight",) if head else (), rank)


def make_state(layout, seed=0, zero_b=False, memory=None):
    """Random factors of the layout's rank; B of zeros, as LoRA starts, if asked for."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for pair in layout.pairs:
        out, inner = pair.shape
        tensors[pair.a] = torch.randn((layout.rank, inner), generator=generator)
        b = torch.randn((out, layout.rank), generator=generator)
        tensors[pair.b] = torch.zeros_like(b) if zero_b else b
    for name in layout.others:
        tensors[name] = torch.randn((3, 2), generator=generator)
    return GlobalState(tensors, {}, memory or {})


def make_updates(state, count, seed=1, weights=None, ranks=None, layout=None, parts=None, size=0.1, metrics=None):
    """Random updates of clients c00, c01, ...: of their own ranks, of some parts (A, B, other) only, if wanted."""
    generator = torch.Generator().manual_seed(seed)
    names = sorted(state.tensors if parts is None else layout.names(parts))
    updates = []
    for index in range(count):
        delta = {}
        for name in names:
            shape = list(state.tensors[name].shape)
            if ranks and layout.part_of(name) != "other":
                shape[0 if layout.part_of(name) == "A" else 1] = ranks[index]
            delta[name] = size * torch.randn(shape, generator=generator)
        weight = float(weights[index]) if weights else 1.0
        updates.append(ClientUpdate(f"c{index:02}", 1, delta, weight, dict(metrics[index]) if metrics else {}))
    return updates


def make_situation(state, layout, number=1, population=10, seed=0):
    """The situation of one round."""
    return Situation(number, state, layout, population, seed)
