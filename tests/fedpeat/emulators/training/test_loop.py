import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedpeat.core import ConfigError, ModelError
from fedpeat.emulators.training import Pace, loop
from fedpeat.emulators.training.loop import batch_indices, check_finite, descend, read_kept, write_kept

PACE = Pace(steps=12, learning_rate=0.1, batch_size=2, warmup=3, clip_norm=1.0)


class StopHereError(Exception):
    pass


def problem():
    """Two parameters, one of which never gets a gradient, and a loss that depends on the step."""
    parameters = {"a": nn.Parameter(torch.tensor([3.0, -2.0])), "idle": nn.Parameter(torch.ones(1))}

    def loss_at(step):
        goal = 0.1 * torch.randn(2, generator=torch.Generator().manual_seed(step))
        return (parameters["a"] - goal).square().sum()

    return parameters, loss_at


def descended(folder=None, *, stop_after=None, told=None):
    parameters, loss_at = problem()
    told = [] if told is None else told

    def tell(share):
        told.append(share)
        if stop_after is not None and len(told) == stop_after:
            raise StopHereError

    losses = descend(parameters, loss_at, PACE, folder=folder, tell=tell)
    return losses, parameters["a"].detach().clone()


@given(st.integers(0, 5), st.integers(1, 9), st.integers(1, 5), st.integers(1, 30))
def test_each_epoch_goes_through_all_rows(seed, count, size, steps):
    batches = [batch_indices(seed, "any", count=count, size=size, step=step) for step in range(steps)]
    drawn = [row for batch in batches for row in batch]
    assert all(len(batch) == size for batch in batches)
    for start in range(0, len(drawn) - count + 1, count):
        assert sorted(drawn[start : start + count]) == list(range(count))


def test_orders_differ_by_seed_purpose_and_epoch():
    orders = {
        tuple(batch_indices(seed, purpose, count=50, size=50, step=step))
        for seed in (0, 1)
        for purpose in ("one", "two")
        for step in (0, 1)
    }
    assert len(orders) == 8


def test_it_descends_and_its_steps_are_told():
    told = []
    losses, _ = descended(told=told)
    assert len(losses) == PACE.steps
    assert sum(losses[-4:]) < sum(losses[:4])
    assert told == [(step + 1) / 12 for step in range(12)]


@pytest.mark.parametrize("stops", [[1], [5], [11], [12], [4, 3, 2]])
def test_interrupted_it_ends_in_the_same_bits(stops, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    expected = descended()
    for stop_after in stops:
        with pytest.raises(StopHereError):
            descended(tmp_path, stop_after=stop_after)
    told = []
    losses, value = descended(tmp_path, told=told)
    assert losses == expected[0]
    assert torch.equal(value, expected[1])
    assert len(told) == 12 - sum(stops)
    assert len(list(tmp_path.glob("step-*"))) == 2


def test_time_decides_when_a_checkpoint_is_due(tmp_path, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(loop.time, "monotonic", lambda: 5.0 * next(clock))
    with pytest.raises(StopHereError):
        descended(tmp_path, stop_after=3)
    assert not list(tmp_path.iterdir())
    with pytest.raises(StopHereError):
        descended(tmp_path, stop_after=5)
    assert {path.name for path in tmp_path.glob("step-*")} == {"step-4.json", "step-4.safetensors"}


@pytest.mark.parametrize("name", ["last.json", "step-3.json", "step-3.safetensors"])
@pytest.mark.parametrize("harm", ["cut", "gone", "flipped"])
def test_a_damaged_checkpoint_is_ignored(name, harm, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(StopHereError):
        descended(tmp_path, stop_after=3)
    path = tmp_path / name
    raw = path.read_bytes()
    path.unlink()
    if harm == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    elif harm == "flipped":
        path.write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    told = []
    losses, value = descended(tmp_path, told=told)
    assert (losses, len(told)) == (descended()[0], 12)
    assert torch.equal(value, descended()[1])


def test_a_checkpoint_of_other_parameters_is_ignored(tmp_path):
    write_kept(tmp_path, "step-1", {"value.other": torch.ones(2)}, {"losses": [1.0]})
    (tmp_path / "last.json").write_text('{"name": "step-1"}')
    assert descended(tmp_path)[0] == descended()[0]


def test_what_is_kept_is_read_and_what_is_not_is_none(tmp_path):
    assert read_kept(tmp_path, "it") is None
    write_kept(tmp_path, "it", {"x": torch.ones(2)}, {"said": [1, 0.1]})
    tensors, said = read_kept(tmp_path, "it")
    assert torch.equal(tensors["x"], torch.ones(2))
    assert said["said"] == [1, 0.1]


def test_the_first_step_is_as_long_as_it_should_be():
    parameters = {"a": nn.Parameter(torch.tensor([2.0]))}
    descend(parameters, lambda _: parameters["a"].square().sum(), Pace(1, 0.5, 1, 5, None))
    assert parameters["a"].item() == pytest.approx(2.0 - 0.5 / 5)  # Adam's first step has the length of its rate


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(loss):
    with pytest.raises(ModelError, match=r"after 7 steps; the loss is (nan|inf); lower its learning_rate"):
        check_finite(loss, 7)
    assert check_finite(1.5, 7) == 1.5


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"warmup": -1},
        {"clip_norm": 0.0},
        {"learning_rate": 0.0},
        {"learning_rate": float("inf")},
    ],
)
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match="cannot train an emulator so"):
        Pace(**{**vars(PACE), **wrong}).check()
    PACE.check()
