import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeat.data.packing import join, pack
from fedpeat.data.text import TokenisedDocuments, Tokens

FILL = 0


def tokens_of(texts):
    flat = [token for text in texts for token in text]
    return Tokens(np.array(flat, dtype=np.int32), np.cumsum([0, *(len(text) for text in texts)]))


def documents_of(texts, prompts=None, begins=False):
    return TokenisedDocuments(tokens_of(texts), None if prompts is None else tokens_of(prompts), FILL, begins)


texts_strategy = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), max_size=8)


@settings(deadline=None)
@given(texts=texts_strategy, block_size=st.integers(2, 7))
def test_dropping_and_padding_give_the_stream_back(texts, block_size):
    stream = [token for text in texts for token in text]
    chosen = np.arange(len(texts))
    dropped = pack(documents_of(texts), chosen, block_size=block_size, tail="drop")
    padded = pack(documents_of(texts), chosen, block_size=block_size, tail="pad")
    assert dropped.ids.ravel().tolist() == stream[: len(stream) - dropped.dropped_tokens]
    assert dropped.dropped_tokens < block_size
    assert dropped.tokens == len(dropped) * block_size
    assert [int(i) for row, n in zip(padded.ids, padded.lengths, strict=True) for i in row[:n]] == stream
    assert (padded.tokens, padded.dropped_tokens) == (len(stream), 0)
    assert padded.ids.shape == (-(-len(stream) // block_size), block_size)


def test_documents_are_laid_in_the_order_chosen():
    packed = pack(documents_of([[1, 2], [3], [4, 5, 6]]), np.array([2, 0]), block_size=2, tail="drop")
    assert packed.ids.tolist() == [[4, 5], [6, 1]]
    assert packed.dropped_tokens == 1


def test_a_pair_is_a_row_scored_after_its_prompt():
    packed = pack(documents_of([[7, 8], [9]], [[1, 2, 3], []]), np.arange(2), block_size=6, tail="drop")
    assert packed.ids.tolist() == [[1, 2, 3, 7, 8, FILL], [9, FILL, FILL, FILL, FILL, FILL]]
    assert packed.scored_from.tolist() == [3, 0]
    assert packed.lengths.tolist() == [5, 1]
    assert packed.truncated == 0


def test_a_long_prompt_loses_its_beginning_but_not_its_first_token():
    packed = pack(documents_of([[7, 8]], [[1, 2, 3, 4, 5, 6]], begins=True), np.arange(1), block_size=6, tail="drop")
    assert packed.ids.tolist() == [[1, 4, 5, 6, 7, 8]]
    assert (packed.truncated, packed.dropped_tokens) == (1, 2)
    unbegun = pack(documents_of([[7, 8]], [[1, 2, 3, 4, 5, 6]]), np.arange(1), block_size=6, tail="drop")
    assert unbegun.ids.tolist() == [[3, 4, 5, 6, 7, 8]]


@settings(deadline=None)
@given(
    prompt=st.lists(st.integers(1, 99), max_size=12),
    answer=st.lists(st.integers(1, 99), min_size=1, max_size=12),
    block_size=st.integers(2, 9),
    begins=st.booleans(),
)
def test_every_pair_keeps_some_of_its_answer(prompt, answer, block_size, begins):
    documents = documents_of([answer], [prompt], begins=begins and bool(prompt))
    packed = pack(documents, np.arange(1), block_size=block_size, tail="drop")
    first, last = int(packed.scored_from[0]), int(packed.lengths[0])
    assert packed.ids[0, first:last].tolist() == answer[: last - first]
    assert last - first >= min(len(answer), block_size // 2)
    assert first >= min(len(prompt), block_size // 2)
    assert packed.dropped_tokens == max(len(prompt) + len(answer) - block_size, 0)


def test_join_of_nothing_has_no_rows():
    assert join([], block_size=4).ids.shape == (0, 4)
