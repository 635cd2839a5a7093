"""Rounds for tests of robust rules: honest clients that agree but for noise, and what hostile ones send."""

from dataclasses import replace

import numpy as np
import torch

from strategies.robust import bulyan, fl_trust, geometric_median, krum, multi_krum, norm_clipping
from tests.federations import make_layout, make_situation, make_state, make_updates
from tests.oracles import robust as oracle

MEASURES = ["products", "factors", "both"]
ALL = {
    "krum": krum,
    "multi_krum": multi_krum,
    "bulyan": bulyan,
    "geometric_median": geometric_median,
    "norm_clipping": norm_clipping,
    "fl_trust": fl_trust,
}


def reduce(recipe, situation, updates):
    folded = recipe.reduce.start(situation)
    for update in updates:
        folded = recipe.reduce.add(folded, update)
    return recipe.reduce.finish(folded)


def federation(count=7, seed=0, head=True, size=0.1, **more):
    layout = make_layout(head=head)
    state = make_state(layout, seed)
    return make_situation(state, layout), make_updates(state, count, seed + 1, size=size, layout=layout, **more)


def signed(updates):
    """The same, the last as the server's."""
    return [*updates[:-1], replace(updates[-1], client="server")]


def points(situation, updates, measure):
    return oracle.points(situation.state, situation.layout, [update.delta for update in updates], measure)


def deltas_of(updates):
    return [{name: delta.numpy() for name, delta in update.delta.items()} for update in updates]


def same(got, want, atol=1e-6):
    assert set(got) == set(want)
    for name in want:
        assert got[name].dtype == torch.float32
        np.testing.assert_allclose(got[name].numpy(), np.asarray(want[name]), rtol=1e-5, atol=atol)


def hostile(situation, kind, like):
    """What an attacker sends instead of an honest update."""
    tensors = situation.state.tensors
    made = {
        "huge": {name: torch.full_like(delta, 1e30) for name, delta in like.items()},
        "largest": {name: torch.full_like(delta, -3e38) for name, delta in like.items()},
        "flipped and boosted": {name: -20 * delta for name, delta in like.items()},
        "rescaled factors": {
            **{name: torch.zeros_like(delta) for name, delta in like.items()},
            **{pair.a: tensors[pair.a] * (1e-6 - 1) for pair in situation.layout.pairs},
            **{pair.b: tensors[pair.b] * (1e6 - 1) for pair in situation.layout.pairs},
        },
    }
    return made[kind]


def near(updates, spread=0.2, seed=3):
    """Honest updates that agree but for noise."""
    first = updates[0].delta
    generator = torch.Generator().manual_seed(seed)
    return [
        replace(
            update,
            delta={
                n: d + spread * d.norm() / d.numel() ** 0.5 * torch.randn(d.shape, generator=generator)
                for n, d in first.items()
            },
        )
        for update in updates
    ]
