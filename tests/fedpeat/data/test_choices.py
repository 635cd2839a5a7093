import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeat.core import ConfigError, DataError, StorageError
from fedpeat.data import DataSpec, Rows, open_choices, open_rows
from fedpeat.data.choices import MOST, Choices, make_choices
from fedpeat.data.text import Documents, tokenise
from tests.fedpeat.data.corpus import SPECIAL, make_tokenizer, write_jsonl

PAIRS = {"prompt_field": "ask", "answer_field": "say", "prompt_template": "{prompt} ", "client_field": "who"}
FIRST = len(SPECIAL)
WORDS = ("d500", "d501 d502", "d503")


def questions(count, answers=WORDS, words=3):
    """Question i is of word i; its answer is number i of `answers`, over and over."""
    return [
        {"ask": " ".join([f"d{i}"] * words), "say": answers[i % len(answers)], "who": "ab"[i % 2]} for i in range(count)
    ]


def made(texts, prompts, *, choices="auto", block_size=8, begins=False, chosen=None):
    tokenizer = make_tokenizer(begins=begins)
    source = {"kind": "jsonl", "path": "x", "block_size": block_size, **PAIRS, "choices": choices}
    documents = Documents(texts, prompts)
    tokens = tokenise(documents, tokenizer=tokenizer)
    chosen = np.arange(len(texts)) if chosen is None else chosen
    return make_choices(documents, tokens, chosen, DataSpec.of(source), tokenizer=tokenizer)


def by_document(choices):
    """Return, for each document, the ids that each of its rows reads and those it scores."""
    ids, labels = choices.rows.input_ids, choices.rows.labels
    mask = torch.ones_like(ids) if choices.rows.attention_mask is None else choices.rows.attention_mask
    rows = [
        (one[there == 1].tolist(), one[scored != -100].tolist())
        for one, scored, there in zip(ids, labels, mask, strict=True)
    ]
    count = len(choices.names)
    return [rows[first : first + count] for first in range(0, len(rows), count)]


def test_the_right_answers_row_is_the_test_row_and_the_others_differ_in_the_answer_alone(prepared):
    data = prepared(questions(40), **PAIRS, choices="auto", test_share=0.3, block_size=9)
    choices, test = open_choices(data.folder), open_rows(data.folder, "server", "test")
    assert isinstance(choices, Choices)
    assert choices.names == WORDS
    assert len(choices) == len(test) == data.report["choices"]["documents"] > 5
    assert choices.rows.input_ids.shape == (3 * len(test), 9)
    right = torch.arange(len(test)) * 3 + choices.right
    assert torch.equal(choices.rows.input_ids[right], test.input_ids)
    assert torch.equal(choices.rows.labels[right], test.labels)
    assert choices.rows.attention_mask is not None
    assert test.attention_mask is not None
    assert torch.equal(choices.rows.attention_mask[right], test.attention_mask)
    for document, number in zip(by_document(choices), choices.right.tolist(), strict=True):
        word = document[0][0][0]
        assert (word - FIRST) % 3 == number
        answers = [[FIRST + 500, 2], [FIRST + 501, FIRST + 502, 2], [FIRST + 503, 2]]
        assert document == [([word] * 3 + answer, answer) for answer in answers]


def test_choices_are_as_listed_in_that_order_and_white_space_counts_for_nothing(prepared):
    rows = questions(30, ("d501  d502 ", "d500"))
    data = prepared(rows, **PAIRS, choices=["d500", "d501 d502", "d599"], test_share=0.3, block_size=9)
    choices = open_choices(data.folder)
    assert choices.names == ("d500", "d501 d502", "d599")
    assert set(choices.right.tolist()) == {0, 1}
    assert by_document(choices)[0][2][1] == [FIRST + 599, 2]


def test_numbered_labels_are_answers_if_there_are_choices(tmp_path, prepared):
    rows = [{**row, "say": i % 2} for i, row in enumerate(questions(30))]
    assert open_choices(prepared(rows, **PAIRS, choices="auto", test_share=0.3).folder).names == ("0", "1")
    assert open_choices(prepared(rows, **PAIRS, choices=[1, 0], test_share=0.3).folder).names == ("1", "0")
    with pytest.raises(DataError, match="must hold text"):
        prepared(rows, **PAIRS, test_share=0.3)
    with pytest.raises(DataError, match="must hold text"):
        prepared([{**row, "say": True} for row in rows], **PAIRS, choices="auto", test_share=0.3)


def test_without_choices_nothing_is_written_and_folders_are_those_of_before(prepared):
    rows = questions(40)
    plain = prepared(rows, **PAIRS, test_share=0.3)
    assert open_choices(plain.folder) is None
    assert not list(plain.folder.glob("choices*"))
    assert "choices" not in json.loads((plain.folder / "index.json").read_text())["identity"]["spec"]
    chosen = [prepared(rows, **PAIRS, test_share=0.3, choices=choices) for choices in ("auto", list(WORDS))]
    assert len({plain.folder, *(data.folder for data in chosen)}) == 3
    assert "choices" not in plain.report
    one, other = (open_choices(data.folder) for data in chosen)
    assert torch.equal(one.rows.input_ids, other.rows.input_ids)


def test_some_documents_can_be_picked(prepared):
    folder = prepared(questions(40), **PAIRS, choices="auto", test_share=0.5).folder
    whole, counts = open_choices(folder), []
    some = open_choices(folder, lambda count: counts.append(count) or torch.tensor([4, 0]))
    assert counts == [len(whole)]
    assert by_document(some) == [by_document(whole)[4], by_document(whole)[0]]
    assert some.right.tolist() == whole.right[[4, 0]].tolist()


@pytest.mark.parametrize("blocks", [1, 3])
def test_held_out_last_rows_have_choices_too(prepared, blocks):
    data = prepared(questions(30), **PAIRS, choices="auto", test_blocks=blocks)
    choices, test = open_choices(data.folder), open_rows(data.folder, "server", "test")
    assert len(choices) == len(test) == 2 * blocks
    assert torch.equal(choices.rows.input_ids[torch.arange(len(test)) * 3 + choices.right], test.input_ids)


def test_the_servers_own_documents_count(prepared, tmp_path):
    own = write_jsonl(tmp_path / "own.jsonl", questions(60)[40:])
    data = prepared(questions(40), **PAIRS, choices="auto", test_blocks=1, server_path=str(own))
    choices, test = open_choices(data.folder), open_rows(data.folder, "server", "test")
    assert len(choices) == len(test) == 20
    assert torch.equal(choices.rows.input_ids[torch.arange(len(test)) * 3 + choices.right], test.input_ids)


def test_a_long_prompt_is_cut_alike_for_every_answer_and_counted(prepared):
    rows = [*questions(20), *[{**row, "ask": row["ask"] * 1 + " d9 d8 d7 d6"} for row in questions(40)[20:]]]
    data = prepared(rows, **PAIRS, choices="auto", test_share=0.5, block_size=8)
    choices = open_choices(data.folder)
    long = [document for document in by_document(choices) if FIRST + 6 in document[0][0]]
    assert data.report["choices"]["cut"] == len(long) > 0
    for document in long:
        prompts = {tuple(read[: len(read) - len(scored)]) for read, scored in document}
        assert len(prompts) == 1
        assert prompts.pop()[-4:] == (FIRST + 9, FIRST + 8, FIRST + 7, FIRST + 6)
        assert [len(scored) for _, scored in document] == [2, 3, 2]


@settings(deadline=None)
@given(
    prompts=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    answers=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    block_size=st.integers(6, 12),
    begins=st.booleans(),
)
def test_every_row_is_the_end_of_its_prompt_and_a_whole_answer(prompts, answers, block_size, begins):
    names = [" ".join([f"d{100 + number}"] * length) for number, length in enumerate(answers)]
    texts = [names[number % len(names)] for number in range(len(prompts))]
    asked = [" ".join(f"d{word}" for word in range(length)) for length in prompts]
    found = made(texts, asked, choices=names, block_size=block_size, begins=begins)
    room = block_size - max(answers) - 1
    begin = [1] if begins else []
    assert found.tensors["right"].tolist() == [number % len(names) for number in range(len(prompts))]
    assert found.tensors["prompts"].shape == (len(prompts), room)
    assert found.report["cut"] == sum(length + len(begin) > room for length in prompts)
    for row, length in enumerate(prompts):
        words = [FIRST + word for word in range(length)]
        kept = begin + words[max(length + len(begin) - room, 0) :]
        assert found.tensors["prompts"][row, : found.tensors["prompt_lengths"][row]].tolist() == kept
    for number, length in enumerate(answers):
        wanted = [FIRST + 100 + number] * length + [2]
        assert found.tensors["answers"][number, : found.tensors["answer_lengths"][number]].tolist() == wanted


def test_the_share_of_the_most_frequent_answer_is_told():
    report = made(["d1", "d2", "d1", "d1"], ["d5", "d6", "d7", "d8"]).report
    assert report == {"names": ["d1", "d2"], "documents": 4, "cut": 0, "most_frequent": 0.75}


@pytest.mark.parametrize(
    ("settings", "texts", "error", "message"),
    [
        ({"choices": "auto"}, [f"d{i}" for i in range(MOST + 1)], DataError, "has 65 distinct answers: d0, d1"),
        ({"choices": "auto"}, ["d1", " d1 "], DataError, "has 1 distinct answers"),
        ({"choices": ["d1", "d2"]}, ["d1", "d2", "d3", "d3"], DataError, "2 of 4 held-out documents have others: 'd3'"),
        ({"choices": ["d1", "d2 " * 7]}, ["d1", "d1"], DataError, "has 8 tokens, data.block_size=8"),
        ({"choices": "auto", "chosen": np.arange(0)}, ["d1", "d2"], DataError, "raise data.test_share"),
        ({"choices": "auot"}, ["d1"], ConfigError, "set data.choices to auto"),
        ({"choices": ["d1"]}, ["d1"], ConfigError, "two or more"),
        ({"choices": ["d1", "d1 "]}, ["d1"], ConfigError, "two or more"),
        ({"choices": ["d1", ""]}, ["d1"], ConfigError, "two or more"),
        ({"choices": [True, False]}, ["d1"], ConfigError, "in quotes"),
        ({"choices": [["d1"], "d2"]}, ["d1"], ConfigError, "two or more"),
    ],
)
def test_choices_that_cannot_be_are_told(settings, texts, error, message):
    with pytest.raises(error, match=message):
        made(texts, [f"d{i} d10" for i in range(len(texts))], **settings)


def test_the_most_answers_that_auto_takes():
    assert len(made([f"d{i}" for i in range(MOST)], ["d1"] * MOST).report["names"]) == MOST


def test_choices_need_pairs():
    with pytest.raises(ConfigError, match="documents have no answers"):
        DataSpec.of({"kind": "jsonl", "path": "x", "block_size": 8, "choices": "auto"})


def test_a_damaged_file_is_told_and_made_anew(prepared):
    call = {"rows": questions(40), **PAIRS, "choices": "auto", "test_share": 0.3}
    data = prepared(**call)
    path = data.folder / "choices.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    with pytest.raises(StorageError, match="prepare the data again"):
        open_choices(data.folder)
    assert prepared(**call) == data
    assert path.read_bytes() == whole


def test_rows_that_fill_the_block_need_no_mask(prepared):
    data = prepared(questions(30, ("d500", "d501")), **PAIRS, choices="auto", test_share=0.5, block_size=5)
    rows = open_choices(data.folder).rows
    assert isinstance(rows, Rows)
    assert rows.attention_mask is None
    assert (rows.labels != -100).sum(1).tolist() == [2] * len(rows)
