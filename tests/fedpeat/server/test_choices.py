import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeat.core import ConfigError
from fedpeat.data import Choices, Rows
from fedpeat.server import check_normalise, choose
from fedpeat.server.choices import score

ANSWERS = ([7, 2], [8, 9, 2], [7, 9, 10, 2])


def choices_of(prompts, right, *, answers=ANSWERS, tokens=12, fill=3):
    """Every answer after every prompt, padded on the right, as `open_choices` gives them."""
    ids, labels, mask = [], [], []
    for prompt in prompts:
        for answer in answers:
            rest = tokens - len(prompt) - len(answer)
            ids.append([*prompt, *answer, *[fill] * rest])
            labels.append([*[-100] * len(prompt), *answer, *[-100] * rest])
            mask.append([1] * (tokens - rest) + [0] * rest)
    rows = Rows(torch.tensor(ids), torch.tensor(labels), torch.tensor(mask))
    return Choices(rows, torch.tensor(right), tuple(str(number) for number in range(len(answers))))


def slowly(model, choices):
    """One row at a time, without padding, in plain words."""
    found = []
    for row in range(len(choices.rows)):
        there = int(choices.rows.attention_mask[row].sum())
        ids, labels = choices.rows.input_ids[row, :there], choices.rows.labels[row, :there]
        with torch.no_grad():
            likely = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        places = [place for place in range(1, there) if labels[place] != -100]
        found.append(sum(float(likely[place - 1, ids[place]]) for place in places))
    return torch.tensor(found, dtype=torch.float64).reshape(len(choices), -1)


class Table(torch.nn.Module):
    """Gives each next token the logits of the token before it."""

    def __init__(self, table, prompt=0):
        super().__init__()
        self.table, self.prompt, self.seen = table, prompt, []

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        self.seen.append((tuple(input_ids.shape), self.training, torch.get_num_threads()))
        logits = self.table[input_ids]
        before = torch.full((len(input_ids), self.prompt, logits.shape[-1]), 50.0)
        return type("Output", (), {"logits": torch.cat([before, logits], dim=1)})


def random_prompts(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (count,), generator=generator).tolist()
    return [torch.randint(11, 99, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_scores_are_those_of_a_slow_twin(batch_size, miniature):
    model = miniature("llama", blocks=2).model
    choices = choices_of(random_prompts(9), [0, 1, 2] * 3)
    found = score(model, choices, batch_size=batch_size, threads=1)
    want = slowly(model.eval(), choices)
    assert found.shape == (9, 3)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    result = choose(model, choices, batch_size=batch_size, threads=1)
    assert result.correct == int((want.argmax(1) == choices.right).sum())
    assert (result.documents, result.accuracy) == (9, result.correct / 9)


def test_a_model_that_was_trained_to_be_right_is_right(miniature):
    model = miniature("llama", blocks=2).model.requires_grad_(requires_grad=True)
    prompts, right = random_prompts(12), [0, 1, 2] * 4
    choices = choices_of(prompts, right)
    rows = torch.arange(12) * 3 + torch.tensor(right)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(40):
        loss = model(**choices.rows.batch(rows)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert choose(model, choices, batch_size=8, threads=1).accuracy == 1
    others = Choices(choices.rows, (choices.right + 1) % 3, choices.names)
    assert choose(model, others, batch_size=8, threads=1).accuracy == 0


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 6),
    batch_size=st.integers(1, 7),
    prompt=st.integers(0, 2),
    right=st.integers(0, 2),
)
def test_any_batches_and_input_prompts_give_the_same(seed, count, batch_size, prompt, right):
    table = 3 * torch.randn(99, 99, generator=torch.Generator().manual_seed(seed))
    choices = choices_of(random_prompts(count, seed), [right] * count)
    found = score(Table(table, prompt), choices, batch_size=batch_size, threads=1)
    torch.testing.assert_close(found, slowly(Table(table), choices))


def test_padding_of_a_whole_batch_is_left_out_and_the_model_is_as_it_was():
    model = Table(torch.zeros(99, 99)).train()
    choices = choices_of([[11], [11, 12, 13]], [0, 0])
    choose(model, choices, batch_size=3, threads=1)
    assert [shape for shape, _, _ in model.seen] == [(3, 5), (3, 7)]
    assert all(not training and threads == 1 for _, training, threads in model.seen)
    assert model.training


def test_of_equally_likely_answers_the_first_is_chosen():
    choices = choices_of([[11], [12], [13]], [0, 1, 2], answers=([7, 2], [8, 2], [9, 2]))
    assert choose(Table(torch.zeros(99, 99)), choices, batch_size=2, threads=1).correct == 1


def test_length_counts_unless_it_is_taken_out():
    # Every token has the same likelihood, the last answer's a little more: alone it never wins against fewer tokens.
    table = torch.zeros(99, 99)
    table[:, [9, 10]] += 0.1
    choices = choices_of([[11], [12, 13]], [2, 2])
    assert choose(Table(table), choices, batch_size=2, threads=1).correct == 0
    assert choose(Table(table), choices, batch_size=2, threads=1, normalise="tokens").correct == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_no_answer(value):
    choices = choices_of([[11], [12]], [0, 0])
    assert choose(Table(torch.full((99, 99), value)), choices, batch_size=2, threads=1).accuracy == 0


def test_an_unknown_way_to_compare_is_told():
    with pytest.raises(ConfigError, match="did you mean 'tokens'"):
        check_normalise("token")
    with pytest.raises(ConfigError, match="choose from: none, tokens"):
        choose(Table(torch.zeros(99, 99)), choices_of([[11]], [0]), batch_size=2, threads=1, normalise="x")
