"""The model that is shipped in the package."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedpeat
from simulations.corpora import pack, unigram_loss
from simulations.foundation import mean_loss, only_blocks, uniform_blocks

FOLDER = Path(fedpeat.__file__).parent / "models" / "tiny_docs"
TEXT = """Return the mean of the values along an axis.

The mean is the sum of the values divided by their number. If the input has no
values, the result is not a number and a warning is raised.

Parameters
----------
values : array_like
    The numbers to average. If this is not an array, a conversion is attempted.
axis : int or tuple of ints, optional
    The axis or axes along which the means are computed. The default is to compute
    the mean of the flattened array.
keepdims : bool, optional
    If this is set to True, the axes which are reduced are left in the result as
    dimensions with size one.

Returns
-------
mean : float or array
    A new array with the means, or a number if ``axis`` is None.

Raises
------
ValueError
    If the axis is out of range, or the input is empty.

Examples
--------
>>> mean([1, 2, 3])
2.0
>>> mean([[1, 2], [3, 4]], axis=0)
array([2., 3.])
"""


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_folder_is_small_whole_and_has_a_card():
    assert {path.name for path in FOLDER.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8_000_000
    card = (FOLDER / "README.md").read_text()
    assert all(word in card for word in ("## Data", "## Recipe", "## Measured", "unigram", "untrained", "plug-in"))


def test_model_is_deep_enough_and_its_weights_are_exact(model):
    assert model.config.num_hidden_layers >= 12
    stored = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto").state_dict()
    assert all(torch.equal(stored[name].float(), tensor) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tokenizer_is_lossless_and_fits_the_model(tokenizer, model):
    text = "Übung: 數學\t\n    >>> f'{x!r}' 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == model.config.vocab_size == 2048
    assert tokenizer.eos_token_id == model.config.eos_token_id


def test_model_beats_the_unigrams_of_the_very_text_it_reads(tokenizer, model):
    rows = pack(tokenizer, [TEXT], row_tokens=128)
    loss = mean_loss(model, rows, batch_size=8)
    assert loss < 0.8 * unigram_loss(rows, rows, vocabulary=len(tokenizer))


def test_model_bears_the_loss_of_half_its_middle(tokenizer, model):
    rows = pack(tokenizer, [TEXT], row_tokens=128)
    recipe = {"skip": {"first": 2, "last": 9}, "shape": {"num_hidden_layers": 12}}
    whole = mean_loss(model, rows, batch_size=8)
    with only_blocks(model, uniform_blocks(recipe, 4)):
        thinned = mean_loss(model, rows, batch_size=8)
    with only_blocks(model, [0, 1, 10, 11]):
        none = mean_loss(model, rows, batch_size=8)
    assert whole < thinned < none < unigram_loss(rows, rows, vocabulary=len(tokenizer)) + 2
    assert thinned < whole + 0.5


def test_generation_with_a_cache_equals_without(tokenizer, model):
    prompt = tokenizer("Return the", return_tensors="pt")
    with_cache, without = (
        model.generate(**prompt, max_new_tokens=12, do_sample=False, use_cache=cache) for cache in (True, False)
    )
    assert torch.equal(with_cache, without)
