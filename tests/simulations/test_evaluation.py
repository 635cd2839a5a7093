import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeat.client import Store
from fedpeat.core import ConfigError, DataError, digest
from fedpeat.data import Choices, Rows, open_rows, prepare
from fedpeat.emulators import full_view
from fedpeat.models import make_split
from fedpeat.peft import attach
from fedpeat.server import choose, evaluate
from simulations.evaluation import Evaluator, Personal, evaluator_of, rows_at, spread
from tests.fedpeat.data.corpus import make_tokenizer, write_jsonl


@pytest.fixture
def tuned(miniature):
    view = full_view(miniature("llama", blocks=2), make_split(2, first=1, last=1))
    places = {"path": view.path, "sources": view.sources, "adapter_positions": view.adapter_positions}
    return attach(view.model, method={"kind": "lora", "rank": 2}, seed=7, **places)


def random_like(tensors, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(tensors[name].shape, generator=generator) for name in sorted(tensors)}


def evaluator(rows):
    return Evaluator(rows, batch_size=2, threads=1, device="cpu")


def test_an_evaluator_scores_its_own_rows_or_those_given(tuned, make_ids):
    own, other = make_ids(5, 12), make_ids(3, 12, seed=1)
    scored = evaluator(Rows(own, own))
    for rows, found in ((own, scored(tuned.model)), (other, scored(tuned.model, Rows(other, other)))):
        assert found == evaluate(tuned.model, Rows(rows, rows), batch_size=2, threads=1)
        assert found.tokens == len(rows) * 11


def test_an_evaluator_lets_models_choose_where_there_are_choices(tuned, make_ids):
    ids = make_ids(6, 12)
    rows = Rows(ids, ids.masked_fill(torch.arange(12) < 8, -100))
    choices = Choices(rows, torch.tensor([0, 1]), ("a", "b", "c"))
    scored = dataclasses.replace(evaluator(Rows(ids, ids)), choices=choices)
    found = scored(tuned.model)
    assert found.choice_accuracy == choose(tuned.model, choices, batch_size=2, threads=1).accuracy
    assert dataclasses.replace(found, choice_accuracy=None) == evaluator(Rows(ids, ids))(tuned.model)
    assert scored(tuned.model, rows).choice_accuracy is None  # a client's own rows are no documents with choices


def test_the_evaluator_of_a_run_takes_even_distances_of_rows_and_documents(tmp_path):
    text = [{"ask": f"d{i}", "say": f"d{500 + i % 2}", "who": "ab"[i % 2]} for i in range(40)]
    source = {"kind": "jsonl", "path": str(write_jsonl(tmp_path / "rows.jsonl", text)), "block_size": 5}
    source |= {"prompt_field": "ask", "prompt_template": "{prompt} ", "answer_field": "say", "client_field": "who"}
    how = {"tokenizer": make_tokenizer(), "tokenizer_id": "words", "clients_count": None, "seed": 0}
    settings = {"batch_size": 2, "threads": 1, "max_rows": 4, "normalise": "tokens"}
    for more in ({}, {"choices": "auto"}):
        data = prepare({**source, "test_share": 0.5, **more}, **how, cache_folder=tmp_path)
        made = evaluator_of(settings, data, "cpu")
        test = open_rows(data.folder, "server", "test")
        assert torch.equal(made.rows.input_ids, test.input_ids[spread(len(test), 4)])
        assert (made.normalise, made.choices is None) == ("tokens", not more)
    assert len(made.choices) == 4
    assert torch.equal(made.choices.rows.input_ids[torch.arange(4) * 2 + made.choices.right], made.rows.input_ids)
    assert len(evaluator_of({**settings, "max_rows": None}, data, "cpu").choices) == len(test)
    with pytest.raises(ConfigError, match="did you mean 'tokens'"):
        evaluator_of({**settings, "normalise": "token"}, data, "cpu")


def test_each_client_is_scored_by_its_own_model_and_by_the_tokens_it_has(tuned, make_ids, tmp_path):
    layout, shared = tuned.layout, random_like(tuned.initial, 1)
    ids = {"ann": make_ids(4, 12), "bob": make_ids(1, 12, seed=1), "eve/../ann": make_ids(2, 12, seed=2)}
    rows = {client: Rows(tokens, tokens) for client, tokens in ids.items()}
    rows["ann"] = Rows(ids["ann"], ids["ann"].masked_fill(torch.arange(12) < 5, -100))
    kept = {}
    for client, seed in (("ann", 2), ("eve/../ann", 3)):
        kept[client] = {n: tensor for n, tensor in random_like(shared, seed).items() if n in layout.names(["B"])}
        Store(tmp_path, client).write("personal", kept[client])

    tuned.write(shared)
    before = evaluate(tuned.model, rows["bob"], batch_size=2, threads=1)
    found = Personal(rows, str(tmp_path))(tuned, evaluator(rows["bob"]))
    assert digest(tuned.read()) == digest(shared)

    parts = []
    for client in ids:
        tuned.write({**shared, **kept.get(client, {})})
        parts.append(evaluate(tuned.model, rows[client], batch_size=2, threads=1))
    assert [part.tokens for part in parts] == [28, 11, 22]
    assert parts[1] == before  # bob has kept nothing yet: its model is everybody's
    assert found.tokens == 61
    assert found.loss == pytest.approx(sum(part.loss * part.tokens for part in parts) / 61)
    assert found.accuracy == pytest.approx(sum(part.accuracy * part.tokens for part in parts) / 61)
    tuned.write(shared)
    alike = [evaluate(tuned.model, one, batch_size=2, threads=1) for one in rows.values()]
    assert abs(found.loss - sum(part.loss * part.tokens for part in alike) / 61) > 0.01


def test_with_nothing_kept_personal_models_are_the_shared_one(tuned, make_ids, tmp_path):
    ids = make_ids(6, 12)
    rows = {"ann": Rows(ids[:2], ids[:2]), "bob": Rows(ids[2:], ids[2:])}
    found, shared = Personal(rows, str(tmp_path))(tuned, evaluator(rows["ann"])), evaluator(Rows(ids, ids))(tuned.model)
    assert found.tokens == shared.tokens
    assert found.loss == pytest.approx(shared.loss, rel=1e-6)
    assert found.accuracy == pytest.approx(shared.accuracy)


@given(st.integers(0, 400), st.integers(1, 400))
def test_chosen_numbers_are_spread_evenly_from_end_to_end(count, limit):
    chosen = spread(count, limit).tolist()
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(count, limit)
    if 1 < limit < count:
        assert (chosen[0], chosen[-1]) == (0, count - 1)
        step = (count - 1) / (limit - 1)
        assert all(abs(number - place * step) <= 0.5 + 1e-9 for place, number in enumerate(chosen))


@pytest.mark.parametrize(("count", "limit"), [(4097, 4096), (10_001, 10_000), (65_538, 65_537), (50_000_000, 1000)])
def test_many_numbers_are_spread_too(count, limit):
    chosen = spread(count, limit)
    assert len(chosen.unique()) == limit
    assert (int(chosen[0]), int(chosen[-1])) == (0, count - 1)


def test_without_a_limit_all_are_chosen():
    assert spread(3, None).tolist() == spread(3, 3).tolist() == spread(3, 9).tolist() == [0, 1, 2]
    assert spread(0, None).tolist() == []


def test_rows_by_their_numbers(make_ids):
    ids = make_ids(5, 6)
    mask = torch.randint(2, (5, 6), generator=torch.Generator().manual_seed(0))
    found = rows_at(Rows(ids, ids + 1, mask), torch.tensor([3, 0]))
    for tensor, whole in ((found.input_ids, ids), (found.labels, ids + 1), (found.attention_mask, mask)):
        assert torch.equal(tensor, whole[[3, 0]])
    assert rows_at(Rows(ids, ids), torch.tensor([1])).attention_mask is None


def test_nothing_to_score_is_told(tuned, make_ids):
    ids = make_ids(2, 6)
    with pytest.raises(DataError, match="held-out"):
        evaluator(Rows(ids, torch.full_like(ids, -100)))(tuned.model)
