"""What a run says of its emulator is what counting on Hugging Face's own model gives; the probe is a plain loop."""

import math
from functools import partial

import pytest
import torch

from fedpeat.core import ConfigError
from tests.oracles import whole_run as oracle
from tests.oracles.memory import kept_for_backward, stored_bytes

ADAPTER, KEPT = (0, 5), (1, 4)
# See test_twins.py: without it AdamW makes whole steps out of rounding noise.
STEADY = "client.optimizer_options={eps: 1e-4}"
PARTS = ("weights", "gradients", "optimizer", "activations")


@pytest.fixture
def run(run):
    """Measured, as other tests' runs are not."""
    return partial(run, "evaluation.costs=true")


def counted(folder, rows, kept):
    """Memory of two rows' training with LoRA of rank 8, of a model cut down by hand."""
    model, trained = oracle.set_up(folder, adapter=ADAPTER, kept=kept, rank=8)
    loss = model.train()(input_ids=rows[:2], labels=rows[:2], use_cache=False).loss
    values = sum(tensor.numel() for tensor in trained.values())
    remembered = 4 * (2 * values + len(trained))  # AdamW: two moments, and a step of its own for each tensor
    return dict(zip(PARTS, (stored_bytes(model), 4 * values, remembered, kept_for_backward(loss, model)), strict=True))


def test_the_emulators_numbers_are_those_of_counting(run, model_folder, held_out):
    ran = run()
    found, rows = ran.summary["emulator"], oracle.read_rows(held_out, 16)
    full, cut = oracle.load(model_folder()), oracle.load(model_folder())
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in full.model.layers]
    cut.model.layers = torch.nn.ModuleList([full.model.layers[index] for index in sorted((*ADAPTER, *KEPT))])
    assert found["emulator_parameters"] == blocks[1] + blocks[4]
    assert found["middle_parameters"] == sum(blocks[1:5])
    assert found["kept_share"] == 0.5
    # Llama's two buffers, the frequencies of its positions and a copy of them, are equal: sent once.
    frequencies = next(iter(full.buffers())).nbytes
    assert found["full_bytes"] == stored_bytes(full) - frequencies
    assert found["bundle_bytes"] == ran.summary["bytes"]["bundle"] == stored_bytes(cut) - frequencies
    for name, kept in (("client_memory", KEPT), ("full_memory", (1, 2, 3, 4))):
        assert found[name] == counted(model_folder(), rows, kept), name
        assert found[f"{name}_bytes"] == sum(found[name].values())
    assert found["step_seconds"] > 0 < found["full_step_seconds"]
    ratio = math.exp(ran.losses["emulator_zero_shot"] - ran.losses["full_zero_shot"])
    assert found["zero_shot_ratio"] == pytest.approx(ratio)
    assert "emulators" not in ran.summary


def test_measuring_changes_nothing_else(run):
    plain, without = run(), run("evaluation.costs=false")
    assert without.digest == plain.digest
    assert without.losses == plain.losses
    measured = {name for name, value in without.summary["emulator"].items() if value is None}
    assert measured == {
        "client_memory",
        "client_memory_bytes",
        "full_memory",
        "full_memory_bytes",
        "step_seconds",
        "full_step_seconds",
    }
    for name in plain.summary["emulator"].keys() - measured:
        assert without.summary["emulator"][name] == plain.summary["emulator"][name]


def test_where_devices_differ_each_emulator_is_told(run):
    found = run("control.kept_blocks={ann: 1, eve: 3}").summary
    emulators = found["emulators"]
    assert set(emulators) == {"default", "kept_1", "kept_3"}
    assert found["emulator"].keys() == emulators["default"].keys()
    assert found["emulator"]["client_memory"] == emulators["default"]["client_memory"]
    for name in ("emulator_parameters", "kept_share", "bundle_bytes", "client_memory_bytes"):
        sizes = [emulators[key][name] for key in ("kept_1", "default", "kept_3")]
        assert sizes == sorted(set(sizes)), name
        assert len({one["full_memory_bytes"] for one in emulators.values()}) == 1


def test_where_nothing_is_left_out_a_device_pays_for_the_full_model(run):
    found = run("emulator.kept_blocks=4").summary["emulator"]
    assert found["kept_share"] == found["zero_shot_ratio"] == 1.0
    assert found["bundle_bytes"] == found["full_bytes"]
    assert found["client_memory"] == found["full_memory"]


def curious_loop(folder, rows, *, kept, steps, client):
    """Fine-tune all of a device's model on its own rows, by hand."""
    model = oracle.load(folder).requires_grad_(True)
    model.model.layers = torch.nn.ModuleList([model.model.layers[index] for index in sorted((*ADAPTER, *kept))])
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=0.002, eps=1e-4)
    oracle.train(model, parameters, rows, optimizer, first=0, steps=steps, batch_size=2, client=client)
    return model


@pytest.mark.parametrize(("keys", "steps"), [((), 4), (("extraction.client=eve", "extraction.steps=7"), 7)], ids=str)
def test_a_curious_client_is_a_plain_loop_on_all_that_it_holds(keys, steps, run, model_folder, notes, held_out):
    ran = run("baselines.extraction=true", "extraction.learning_rate=0.002", STEADY, *keys)
    found = ran.summary["baselines"]["extraction"]
    rows = {author: oracle.read_rows(notes, 16, author) for author in ("ann", "bob", "eve")}
    client = "eve" if keys else max(rows, key=lambda author: len(rows[author]))
    assert (found["client"], found["steps"]) == (client, steps)
    model = curious_loop(model_folder(), rows[client], kept=KEPT, steps=steps, client=client)
    own = oracle.loss_of(model, oracle.read_rows(held_out, 16))
    assert found["loss"] == pytest.approx(own, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(own), abs=1e-3)
    assert found["loss"] < ran.losses["emulator_zero_shot"] - 0.01
    assert ran.summary["extraction_margin"] == pytest.approx(found["loss"] - ran.losses["plug_in"])


def test_the_probe_leaves_the_federation_alone(run):
    plain, both = run(STEADY), run("baselines.extraction=true", STEADY)
    assert both.digest == plain.digest
    assert both.losses == plain.losses
    assert "extraction_margin" not in plain.summary
    alone = run("baselines.extraction=true", "baselines.federated=false", STEADY)
    assert alone.summary["baselines"] == both.summary["baselines"]


def test_stored_layers_are_made_dense_first(run):
    ran = run("emulator=int8", "baselines.extraction=true", "extraction.steps=20", without=("emulator.kept_blocks",))
    found = ran.summary["emulator"]
    assert found["kept_share"] == 1.0
    assert found["bundle_bytes"] < found["full_bytes"]
    assert found["client_memory"]["weights"] < found["full_memory"]["weights"]
    assert ran.summary["baselines"]["extraction"]["loss"] < ran.losses["emulator_zero_shot"] - 0.01


def test_a_stranger_cannot_be_the_curious_client(run):
    with pytest.raises(ConfigError, match="did you mean 'ann'"):
        run("baselines.extraction=true", "extraction.client=anne", anew=True)
