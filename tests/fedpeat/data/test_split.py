import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeat.core import DataError
from fedpeat.data import DataSpec
from fedpeat.data.split import hold_out, take_server_documents


def spec_of(**settings):
    return DataSpec.of({"kind": "jsonl", "path": "x", "block_size": 6, **settings})


@settings(deadline=None)
@given(
    count=st.integers(1, 40),
    test=st.floats(0, 0.5),
    validation=st.floats(0, 0.4),
    seed=st.integers(0, 99),
    aside=st.integers(0, 3),
)
def test_each_document_has_one_part_and_training_is_never_empty(count, test, validation, seed, aside):
    documents = np.arange(100, 100 + count)
    held_out = np.zeros(200, dtype=bool)
    held_out[100 : 100 + aside] = True
    spec = spec_of(test_share=test, validation_share=validation)
    parts = hold_out(documents, spec, held_out=held_out, client="c", seed=seed)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == documents.tolist()
    assert held_out[parts["test"]].sum() == min(aside, count)
    assert len(parts["train"]) >= (aside < count)
    free = max(count - aside, 0)
    assert abs(len(parts["test"]) - min(aside, count) - test * free) <= 1


def test_a_share_is_met_over_many_small_clients():
    spec = spec_of(test_share=0.1)
    none = np.zeros(5, dtype=bool)
    parts = [hold_out(np.arange(5), spec, held_out=none, client=f"c{i}", seed=0) for i in range(2000)]
    assert sum(len(part["test"]) for part in parts) / 10_000 == pytest.approx(0.1, abs=0.01)


def test_who_is_held_out_follows_seed_and_name():
    spec = spec_of(test_share=0.5)
    none = np.zeros(60, dtype=bool)

    def chosen(client, seed):
        return hold_out(np.arange(60), spec, held_out=none, client=client, seed=seed)["test"].tolist()

    assert chosen("a", 0) == chosen("a", 0)
    assert chosen("a", 0) != chosen("b", 0)
    assert chosen("a", 0) != chosen("a", 1)


def take(own, clients, held_out=(), **shares):
    aside = np.zeros(own + clients, dtype=bool)
    aside[list(held_out)] = True
    numbers = np.arange(own + clients)
    return take_server_documents(spec_of(**shares), own=numbers[:own], clients=numbers[own:], held_out=aside, seed=0)


def test_the_server_takes_its_shares_before_the_clients():
    taken = take(0, 50, held_out=range(10), server_share=0.25, public_share=0.1)
    assert (len(taken.train), len(taken.public), len(taken.test)) == (10, 4, 0)
    assert sorted([*taken.train, *taken.public, *taken.rest]) == list(range(50))
    assert set(range(10)) <= set(taken.rest.tolist())


def test_a_source_of_its_own_leaves_the_clients_theirs():
    taken = take(20, 30, server_share=0.25, public_share=0.25)
    assert sorted([*taken.train, *taken.public, *taken.test]) == list(range(20))
    assert (len(taken.train), len(taken.public), len(taken.test)) == (5, 5, 10)
    assert taken.rest.tolist() == list(range(20, 50))


def test_a_share_of_too_little_is_told():
    with pytest.raises(DataError, match=r"data.server_share=0.01 is no document; there are 10"):
        take(0, 10, server_share=0.01)
