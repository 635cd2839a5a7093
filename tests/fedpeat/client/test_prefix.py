import pytest
import torch

from fedpeat.client import TrainingSpec, train
from fedpeat.client.prefix import MIB, Prefix, frozen_blocks
from fedpeat.core import ConfigError, StorageError

NAMED = ("gpt2", "opt", "bloom", "llama", "qwen3", "gemma2")
QUIET = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"dropout": 0.0, "attention_dropout": 0.0},
}
SPEC = TrainingSpec(learning_rate=0.01, batch_size=4)


@pytest.fixture
def at_the_end(make_tuned):
    """A maker of models of 4 blocks of which only the last trains."""

    def make(family="llama", method=None, blocks=(3,), **config):
        return make_tuned(family, method, blocks, **{**QUIET.get(family, {}), **config})

    return make


def trained(tuned, rows, prefix, *, start=0, steps=12, spec=SPEC):
    return train(
        tuned, rows, spec=spec, steps=steps, start_step=start, total_steps=99, seed=1, client="ann", prefix=prefix
    )


def largest(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_how_many_blocks_come_before_the_first_that_trains(at_the_end):
    assert frozen_blocks(at_the_end()) == 3
    assert frozen_blocks(at_the_end(blocks=(1, 3))) == 1
    assert frozen_blocks(at_the_end(blocks=(0, 3))) == 0
    assert frozen_blocks(at_the_end(method={"kind": "full"}, tie_word_embeddings=False)) == 3
    head = {"kind": "full", "train_head": True}
    assert frozen_blocks(at_the_end(method=head, tie_word_embeddings=False)) == 3
    both = {"kind": "full", "train_embeddings": True, "train_head": True}
    assert frozen_blocks(at_the_end(method=both, tie_word_embeddings=True)) == 0
    assert frozen_blocks(at_the_end("gpt2", resid_pdrop=0.1)) == 0
    assert frozen_blocks(at_the_end(attention_dropout=0.1)) == 0


@pytest.mark.parametrize("named", NAMED)
def test_training_is_the_same(named, at_the_end, rows, tmp_path):
    plain = trained(at_the_end(named), rows, None)
    tuned = at_the_end(named)
    prefix = Prefix(tuned, rows, tmp_path, limit_mib=1, precision="fp32")
    kept = trained(tuned, rows, prefix)
    # 12 steps of 4 rows go through 21 rows more than twice.
    assert prefix.hits >= 5
    assert largest(plain.delta, kept.delta) <= 1e-6
    assert kept.metrics["train_loss_last"] == pytest.approx(plain.metrics["train_loss_last"], abs=1e-6)
    again = Prefix(tuned, rows, tmp_path, limit_mib=1, precision="fp32")
    later = trained(tuned, rows, again, start=12)
    assert again.hits >= 10, "the file of the last round serves this one"
    assert largest(later.delta, trained(at_the_end(named), rows, None, start=12).delta) <= 1e-6


def test_with_padding_and_accumulation(at_the_end, answers, tmp_path):
    spec = TrainingSpec(learning_rate=0.01, batch_size=2, accumulate=2)
    plain = trained(at_the_end(), answers, None, spec=spec)
    tuned = at_the_end()
    prefix = Prefix(tuned, answers, tmp_path, limit_mib=1, precision="fp32")
    assert largest(plain.delta, trained(tuned, answers, prefix, spec=spec).delta) <= 1e-6
    assert prefix.hits


def test_bfloat16_states_are_kept_as_they_are(at_the_end, rows, tmp_path):
    plain = trained(at_the_end(dtype="bfloat16"), rows, None)
    tuned = at_the_end(dtype="bfloat16")
    prefix = Prefix(tuned, rows, tmp_path, limit_mib=1, precision="fp32")
    assert largest(plain.delta, trained(tuned, rows, prefix).delta) <= 1e-3
    assert prefix.hits


def test_no_more_than_its_share_of_the_disk(at_the_end, rows, tmp_path):
    tuned = at_the_end()
    limit = 10 * 12 * 32 * 4 / MIB  # ten of the 21 rows
    prefix = Prefix(tuned, rows, tmp_path, limit_mib=limit, precision="fp32")
    kept = trained(tuned, rows, prefix)
    (states,) = tmp_path.glob("*.states.npy")
    assert states.stat().st_size <= limit * MIB + 200
    assert largest(kept.delta, trained(at_the_end(), rows, None).delta) <= 1e-6


def test_another_text_or_model_has_a_file_of_its_own(at_the_end, rows, answers, tmp_path):
    for tuned, text in ((at_the_end(), rows), (at_the_end(), answers), (at_the_end(seed=1), rows)):
        trained(tuned, text, Prefix(tuned, text, tmp_path, limit_mib=1, precision="fp32"), steps=1)
    assert len(list(tmp_path.glob("*.states.npy"))) == 3


@pytest.mark.parametrize("damaged", ["states", "filled"])
def test_a_damaged_file_is_made_anew(damaged, at_the_end, rows, tmp_path):
    tuned = at_the_end()
    trained(tuned, rows, Prefix(tuned, rows, tmp_path, limit_mib=1, precision="fp32"))
    (file,) = tmp_path.glob(f"*.{damaged}.npy")
    file.write_bytes(b"no array")
    again = Prefix(tuned, rows, tmp_path, limit_mib=1, precision="fp32")
    assert largest(trained(tuned, rows, again).delta, trained(at_the_end(), rows, None).delta) <= 1e-6
    assert 0 < again.hits < 12


def test_a_full_disk_is_told(at_the_end, rows, tmp_path):
    tuned = at_the_end()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot keep hidden states.*client\.prefix_mib=0"):
        trained(tuned, rows, Prefix(tuned, rows, tmp_path / "file", limit_mib=1, precision="fp32"), steps=1)


def test_the_model_is_left_as_it_was(at_the_end, rows, tmp_path):
    tuned = at_the_end()
    trained(tuned, rows, Prefix(tuned, rows, tmp_path, limit_mib=1, precision="fp32"))
    for block in tuned.model.get_submodule(tuned.view.path):
        assert "forward" not in vars(block)
        assert not block._forward_hooks
    with torch.no_grad():
        assert torch.isfinite(tuned.model(rows.input_ids).logits).all()


def test_a_compiled_step_cannot_begin_later():
    with pytest.raises(ConfigError, match="choose one of them"):
        TrainingSpec(learning_rate=0.01, batch_size=4, compile=True, prefix_mib=1)
