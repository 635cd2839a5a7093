import numpy as np
import pytest
from datasets import Dataset

from fedpeat.core import DataError
from fedpeat.data import DataSpec
from fedpeat.data.text import Documents, first_occurrences, read_documents, tokenise
from tests.fedpeat.data.corpus import make_tokenizer

TABLE = Dataset.from_list(
    [
        {"instruction": "d1 d2", "context": None, "answer": "d3", "stars": 1},
        {"instruction": "d4", "context": "d5", "answer": "d6 d7", "stars": 2},
    ]
)
PAIRS = {"kind": "jsonl", "path": "x", "block_size": 8, "prompt_field": "instruction", "answer_field": "answer"}


def spec_of(**settings):
    return DataSpec.of({"kind": "jsonl", "path": "x", "block_size": 8, **settings})


def test_whole_documents_come_from_the_text_field():
    assert read_documents(TABLE, spec_of(text_field="answer")) == Documents(["d3", "d6 d7"], None)


def test_a_template_writes_prompts_from_any_field():
    plain = read_documents(TABLE, spec_of(prompt_field="instruction", answer_field="answer"))
    assert plain == Documents(["d3", "d6 d7"], ["d1 d2\n", "d4\n"])
    template = "{{{instruction}}} {context}: "
    written = read_documents(TABLE, spec_of(prompt_template=template, answer_field="answer"))
    assert written.prompts == ["{d1 d2} : ", "{d4} d5: "]
    both = spec_of(prompt_field="instruction", prompt_template="{prompt}|{context}|", answer_field="answer")
    assert read_documents(TABLE, both).prompts == ["d1 d2||", "d4|d5|"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_field": "anser"}, "its fields: instruction, context, answer, stars; did you mean 'answer'"),
        ({"text_field": "stars"}, "must hold text; it holds 1"),
        ({**PAIRS, "prompt_field": "question"}, "data.prompt_field='question' is not in the data"),
        ({**PAIRS, "answer_field": "response"}, "data.answer_field='response' is not in the data"),
        ({**PAIRS, "prompt_template": "{contxt}"}, "did you mean 'context'"),
        ({**PAIRS, "prompt_template": "{answer.__class__}"}, "is not in the data"),
        ({**PAIRS, "prompt_template": "{oops"}, "write {field} for a field"),
    ],
)
def test_wrong_fields_are_told(settings, message):
    with pytest.raises(DataError, match=message):
        read_documents(TABLE, spec_of(**settings))


def test_pairs_repeat_only_if_both_parts_do():
    documents = Documents(["a", "a", " a", " "], ["p", "q", "p ", "p"])
    assert first_occurrences(documents, seen=set()) == ([0, 1], 1, 1)


def test_documents_end_and_begin_as_the_tokenizer_says():
    documents = Documents(["d0 d1", "d2"], None)
    tokens = tokenise(documents, tokenizer=make_tokenizer())
    assert tokens.texts.ids.tolist() == [4, 5, 2, 6, 2]
    assert tokens.texts.lengths(np.array([1, 0])).tolist() == [2, 3]
    begun = tokenise(documents, tokenizer=make_tokenizer(begins=True))
    assert begun.texts.of(1).tolist() == [1, 6, 2]
    assert begun.begins
    assert (begun.fill, len(begun)) == (3, 2)


def test_prompts_begin_and_answers_end():
    tokens = tokenise(Documents(["d1"], ["d0"]), tokenizer=make_tokenizer(begins=True))
    assert tokens.prompts is not None
    assert (tokens.prompts.ids.tolist(), tokens.texts.ids.tolist()) == ([1, 4], [5, 2])


def test_many_documents_are_tokenised_in_chunks_as_in_one():
    texts = [f"d{i % 500} d{(7 * i) % 500}" for i in range(2500)]
    tokens = tokenise(Documents(texts, None), tokenizer=make_tokenizer())
    assert [tokens.texts.of(i).tolist() for i in (0, 999, 1000, 2499)] == [
        [4 + i % 500, 4 + (7 * i) % 500, 2] for i in (0, 999, 1000, 2499)
    ]


@pytest.mark.parametrize(("separator", "ids"), [("eos", [4, 2, 5, 2]), ("bos", [1, 4, 1, 5]), ("none", [4, 5])])
def test_what_separates_whole_documents_can_be_chosen(separator, ids):
    tokenizer = make_tokenizer()
    whole = tokenise(Documents(["d0", "d1"], None), tokenizer=tokenizer, separator=separator)
    assert whole.texts.ids.tolist() == ids
    pairs = tokenise(Documents(["d1"], ["d0"]), tokenizer=tokenizer, separator=separator)
    assert pairs.texts.ids.tolist() == [5, 2]


def test_a_tokenizer_must_have_the_token_that_separates():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = tokenizer.bos_token = None
    with pytest.raises(DataError, match="no beginning-of-sequence token"):
        tokenise(Documents(["d0"], None), tokenizer=tokenizer, separator="bos")
    with pytest.raises(DataError, match="no end-of-sequence token"):
        tokenise(Documents(["d0"], None), tokenizer=tokenizer)
