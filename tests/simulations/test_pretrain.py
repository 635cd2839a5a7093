import copy
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedpeat.core import ConfigError, DataError
from simulations import pretrain as module
from simulations.corpora import END, pack, train_tokenizer
from simulations.foundation import build_model, only_blocks, uniform_blocks
from simulations.pretrain import batch_indices, kept_in_step, learning_rate, pretrain
from simulations.settings import load_settings

WORDS = "block adapter emulator tensor round client server margin delta plan"


def write_library(folder, name, *, modules):
    root = folder / name
    root.mkdir()
    for index in range(modules):
        words = WORDS.split()[index % 10 :] + WORDS.split()
        sentences = " ".join(f"The {word} of {name} number {index} is {number}." for number, word in enumerate(words))
        (root / f"part{index}.py").write_text(f'"""{sentences}"""\n')
    (root / "__init__.py").write_text("")


@pytest.fixture
def settings(tmp_path, monkeypatch):
    for name in ("tiny_pretraining", "tiny_client"):
        write_library(tmp_path, name, modules=40)
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = load_settings(
        [
            f"output={tmp_path / 'model'}",
            f"cache={tmp_path / 'cache'}",
            "libraries=[tiny_pretraining]",
            "client_libraries=[tiny_client]",
            "vocabulary=300",
            "steps=6",
            "warmup_steps=2",
            "decay_steps=3",
            "batch_size=2",
            "row_tokens=32",
            "workers=1",
            "checkpoint_every=2",
            "evaluation.rows=4",
            "evaluation.kept_blocks=[1,2]",
            "evaluation.tuning.kept_blocks=[1]",
            "evaluation.tuning.steps=2",
            "evaluation.tuning.row_tokens=32",
        ],
        config_name="pretrain",
    )
    recipe["shape"] |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    recipe["shape"] |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
    recipe["skip"] = {"first": 1, "last": 2, "share": 0.5, "fewest": 0, "most": 1}
    return recipe


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_makes_a_model_that_loads_with_a_card_that_tells(settings, tmp_path):
    report = pretrain(settings)

    folder = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Ünicode, tabs\tand 'quotes' decode to themselves."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == END
    assert model.config.num_hidden_layers == 4
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    told = report["evaluation"]["clients"]
    assert told["model"]["perplexity"] < told["untrained"]["perplexity"]
    assert set(told["tuned"]["1"]) == {"emulator", "emulated", "plug_in"}
    card = (folder / "README.md").read_text()
    for group in ("held_out", "clients"):
        assert f"{report['evaluation'][group]['model']['perplexity']:,.1f}" in card
    assert str(tmp_path) not in card


def test_interrupted_equals_uninterrupted(settings, tmp_path, monkeypatch):
    pretrain(settings)
    whole = weights(tmp_path / "model")
    shutil.rmtree(tmp_path / "model.partial")

    original = module.kept_in_step
    with monkeypatch.context() as patch:
        patch.setattr(module, "kept_in_step", lambda recipe, step: interrupt() if step == 5 else original(recipe, step))
        with pytest.raises(KeyboardInterrupt):
            pretrain(settings)
    (state,) = (tmp_path / "model.partial").glob("*/state.json")
    assert json.loads(state.read_text())["step"] == 4
    pretrain(settings)

    resumed = weights(tmp_path / "model")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def interrupt():
    raise KeyboardInterrupt


def test_another_recipe_does_not_resume(settings, tmp_path):
    pretrain(settings)
    pretrain({**settings, "seed": 1})
    assert len(list((tmp_path / "model.partial").iterdir())) == 2


@pytest.mark.slow
def test_two_workers_learn_what_one_learns(settings, tmp_path):
    pretrain(settings)
    alone = weights(tmp_path / "model")
    shutil.rmtree(tmp_path / "model.partial")
    pretrain({**settings, "workers": 2})
    together = weights(tmp_path / "model")
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skip": {"first": 1, "last": 4, "share": 0.5, "fewest": 0, "most": 1}}, "cannot skip blocks"),
        ({"skip": {"first": 1, "last": 2, "share": 0.5, "fewest": 0, "most": 3}}, "cannot run 0..3"),
        ({"workers": 3}, "cannot share 2 rows"),
    ],
)
def test_contradictions_are_told(settings, change, message):
    with pytest.raises(ConfigError, match=message):
        pretrain(settings | change)


def test_a_library_is_not_both_trained_on_and_a_client(settings):
    with pytest.raises(DataError, match="they are clients too"):
        pretrain(settings | {"client_libraries": ["tiny_pretraining"]})


def test_too_little_text_is_told(settings):
    with pytest.raises(DataError, match="cannot fill one row"):
        pretrain(settings | {"row_tokens": 100_000})


def test_learning_rate_rises_stays_and_falls(settings):
    recipe = settings | {"steps": 100, "warmup_steps": 10, "decay_steps": 20, "learning_rate": 1.0, "final_share": 0.1}
    rates = [learning_rate(recipe, step) for step in range(100)]
    assert rates[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])
    assert set(rates[10:80]) == {1.0}
    assert rates[80:] == sorted(rates[80:], reverse=True)
    assert 0.1 < rates[-1] < 0.12


def test_steps_skip_as_the_recipe_says(settings):
    recipe = settings | {"skip": {"first": 1, "last": 2, "share": 0.4, "fewest": 0, "most": 1}}
    kept = [kept_in_step(recipe, step) for step in range(500)]
    assert {tuple(blocks) for blocks in kept} == {(0, 1, 2, 3), (0, 3), (0, 1, 3), (0, 2, 3)}
    assert 0.33 < sum(len(blocks) < 4 for blocks in kept) / 500 < 0.47
    assert kept == [kept_in_step(recipe, step) for step in range(500)]


def test_each_epoch_holds_every_row_once(settings):
    steps = [index for step in range(15) for index in batch_indices(settings, 10, step)]
    first, second, third = steps[:10], steps[10:20], steps[20:]
    assert sorted(first) == sorted(second) == sorted(third) == list(range(10))
    assert first != second


def test_blocks_come_back_and_skipped_ones_get_no_gradient(settings):
    model = build_model(settings)
    tokens = torch.arange(8)[None]
    whole = copy.deepcopy(model)(input_ids=tokens, use_cache=False).logits
    with only_blocks(model, [0, 2, 3]):
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    assert torch.equal(model(input_ids=tokens, use_cache=False).logits, whole)
    grads = [all(item.grad is not None for item in block.parameters()) for block in model.model.layers]
    assert grads == [True, False, True, True]


def test_uniform_blocks():
    recipe = {"skip": {"first": 2, "last": 9}, "shape": {"num_hidden_layers": 12}}
    assert uniform_blocks(recipe, 1) == [0, 1, 5, 10, 11]
    assert uniform_blocks(recipe, 2) == [0, 1, 2, 9, 10, 11]
    assert uniform_blocks(recipe, 8) == list(range(12))


def test_packing_loses_only_the_last_part_row():
    texts = ["one two three " * 9, "four five six " * 9]
    tokenizer = train_tokenizer(texts, vocabulary=270, context=64)
    rows = pack(tokenizer, texts, row_tokens=10)
    flat = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert rows.flatten().tolist() == flat[: len(flat) // 10 * 10]
    assert pack(tokenizer, [], row_tokens=10).shape == (0, 10)
