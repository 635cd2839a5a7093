import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeat.client.batches import batch_indices
from fedpeat.core import DataError
from tests.oracles import training as oracle


def batches(rows, size, start, count, seed=3, client="a"):
    return list(batch_indices(rows, batch_size=size, start=start, count=count, seed=seed, client=client))


@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 9), st.integers(0, 9))
def test_the_stream_may_be_entered_anywhere(rows, size, start, count):
    order = oracle.row_order(rows, (start + count) * size, run_seed=3, client="a")
    found = batches(rows, size, start, count)
    assert [len(batch) for batch in found] == [size] * count
    assert [int(row) for batch in found for row in batch] == order[start * size :]


def test_each_epoch_has_every_row_once():
    rows = torch.cat(batches(6, 4, 0, 6)).reshape(4, 6)
    assert rows.sort(dim=1).values.tolist() == [[0, 1, 2, 3, 4, 5]] * 4
    assert len({tuple(epoch) for epoch in rows.tolist()}) == 4


def test_seeds_and_clients_have_orders_of_their_own():
    orders = {tuple(torch.cat(batches(50, 5, 0, 10, seed, client)).tolist()) for seed in (1, 2) for client in "ab"}
    assert len(orders) == 4


def test_the_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    batches(9, 4, 2, 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_client_without_rows_is_told():
    with pytest.raises(DataError, match="no training rows"):
        batches(0, 4, 0, 1)
