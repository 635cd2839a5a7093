import pytest
import torch
from torch.nn import functional

from fedpeat.core import ConfigError
from fedpeat.emulators import full_view, stand_in
from fedpeat.emulators.training import Weights
from fedpeat.emulators.training.hidden import Tap, gap_parts, hidden_states, meeting_taps, relative
from fedpeat.emulators.training.objective import Objective, divergence, measure, with_labels
from fedpeat.models import make_split

FAMILIES = ("gpt2", "opt", "llama", "qwen3", "gemma2")


def both(shop, kept):
    return full_view(shop.loaded, shop.split), stand_in(shop.loaded.model, shop.split, shop.make(kept))


def calls_of(module):
    calls = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    return calls, handle


@pytest.mark.parametrize(
    ("blocks", "kept", "there", "here"),
    [
        ([0, 5], [2], [Tap(5)], [Tap(2)]),
        ([0, 5], [], [Tap(5)], [Tap(1)]),
        ([0, 3, 5], [1, 2], [Tap(3), Tap(5)], [Tap(3), Tap(4)]),
        ([0], [2, 4], [Tap(5, True)], [Tap(2, True)]),
        ([4, 5], [0], [Tap(4)], [Tap(1)]),
        ([2], [0, 1], [Tap(2), Tap(5, True)], [Tap(2), Tap(2, True)]),
    ],
)
def test_where_the_models_meet(blocks, kept, there, here, workshop):
    full, emulated = both(workshop(split=make_split(6, blocks=blocks)), kept)
    assert meeting_taps(full, emulated) == (tuple(there), tuple(here))


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_hidden_states_are_the_models_own(kind, workshop):
    shop = workshop(kind)
    full, _ = both(shop, [2])
    inputs = {"input_ids": shop.context.rows["input_ids"][:3]}
    expected = full.model(**inputs, output_hidden_states=True)
    states, output = hidden_states(full.model, full.path, [Tap(5), Tap(2), Tap(1, True)], inputs, further=True)
    for state, index in zip(states, (5, 2, 2), strict=True):
        assert torch.equal(state, expected.hidden_states[index])
    assert torch.equal(output.logits, expected.logits)


@torch.no_grad()
def test_the_model_runs_no_further_than_needed(workshop):
    shop = workshop()
    model = shop.loaded.model
    last, _ = calls_of(model.model.layers[4])
    beyond, _ = calls_of(model.model.layers[5])
    hooks = [len(block._forward_pre_hooks) for block in model.model.layers]
    _, output = hidden_states(model, "model.layers", [Tap(2), Tap(5)], {"input_ids": torch.ones(1, 4).long()})
    assert (output, len(last), len(beyond)) == (None, 1, 0)
    assert [len(block._forward_pre_hooks) for block in model.model.layers] == hooks
    # An interrupted pass leaves nothing behind either.
    ids = shop.context.rows["input_ids"][:2]
    assert torch.equal(model(ids).logits, shop.loaded.model(ids).logits)


def test_the_gap_is_relative_and_leaves_padding_out():
    generator = torch.Generator().manual_seed(0)
    theirs, ours = (torch.randn(2, 5, 4, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    wild = [state.clone() for state in (theirs, ours)]
    for state in wild:
        state[0, 3:] = 1e6
    gap = relative(gap_parts(wild[:1], wild[1:], {"attention_mask": mask}))
    real = [state[mask.bool()] for state in (theirs, ours)]
    rms = real[0].square().mean().sqrt()
    assert gap.item() == pytest.approx((((real[0] - real[1]) / rms) ** 2).mean().item(), rel=1e-5)
    assert relative(gap_parts([theirs, theirs], [ours, theirs], {})).item() == pytest.approx(
        relative(gap_parts([theirs], [ours], {})).item() / 2
    )
    assert relative(gap_parts([torch.zeros(1, 1, 2)], [torch.zeros(1, 1, 2)], {})).item() == 0.0


def test_the_divergence_is_the_mean_over_tokens():
    generator = torch.Generator().manual_seed(0)
    theirs, ours = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    p, q = theirs.softmax(-1), ours.softmax(-1)
    each = (p * (p / q).log()).sum(-1)
    assert divergence(theirs, ours, {}).item() == pytest.approx(each.mean().item(), rel=1e-5)
    masked = divergence(theirs, ours, {"attention_mask": mask}).item()
    assert masked == pytest.approx(each[mask.bool()].mean().item(), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_is_the_sum_of_its_terms(padded, workshop):
    shop = workshop(padded=padded)
    full, emulated = both(shop, [2])
    batch = {name: tensor[:4] for name, tensor in shop.context.rows.items()}
    terms = []
    for weights in (Weights(1.0, 0, 0), Weights(0, 1.0, 0), Weights(0, 0, 1.0)):
        objective = Objective(full, emulated, weights)
        terms.append(objective.loss(batch, objective.targets(batch)).item())
    mask = {name: tensor for name, tensor in batch.items() if name == "attention_mask"}
    theirs = full.model(batch["input_ids"], **mask, output_hidden_states=True)
    ours = emulated.model(**batch, output_hidden_states=True)
    gap = relative(gap_parts([theirs.hidden_states[5]], [ours.hidden_states[2]], mask))
    scored = functional.cross_entropy(ours.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    expected = [gap.item(), scored.item(), divergence(theirs.logits, ours.logits, mask).item()]
    assert terms == pytest.approx(expected, rel=1e-5)
    objective = Objective(full, emulated, Weights(2.0, 3.0, 0.5))
    total = objective.loss(batch, objective.targets(batch)).item()
    assert total == pytest.approx(2 * terms[0] + 3 * terms[1] + 0.5 * terms[2], rel=1e-5)


@torch.no_grad()
def test_measured_in_batches_is_measured_at_once(workshop):
    shop = workshop(padded=True, rows=7)
    full, emulated = both(shop, [2])
    once = measure(full, emulated, shop.context.rows, batch_size=7)
    assert measure(full, emulated, shop.context.rows, batch_size=3) == pytest.approx(once, rel=1e-5)
    assert once["lm"] == pytest.approx(emulated.model(**shop.context.rows).loss.item(), rel=1e-5)
    unscored = {**shop.context.rows, "labels": torch.full_like(shop.context.rows["labels"], -100)}
    assert measure(full, emulated, unscored, batch_size=3)["lm"] == 0.0


def test_rows_without_labels_are_their_own():
    ids, mask = torch.tensor([[5, 6, 7]]), torch.tensor([[1, 1, 0]])
    assert with_labels({"input_ids": ids})["labels"].tolist() == [[5, 6, 7]]
    assert with_labels({"input_ids": ids, "attention_mask": mask})["labels"].tolist() == [[5, 6, -100]]
    assert with_labels({"input_ids": ids, "labels": mask})["labels"] is mask


@pytest.mark.parametrize("wrong", [Weights(0, 0, 0), Weights(1, -1, 0), Weights(float("nan"), 0, 0)])
def test_weights_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match="give weights >= 0, one of them above 0"):
        wrong.check()
