import pytest
import torch

from fedpeat.core import DataError
from fedpeat.data import Rows
from fedpeat.server import evaluate


class Fixed(torch.nn.Module):
    """Gives the same logits wherever it is asked, after a prompt of some positions."""

    def __init__(self, logits, prompt=0):
        super().__init__()
        self.logits = torch.tensor(logits)
        self.prompt = prompt
        self.seen = []

    def forward(self, input_ids, use_cache=False, **more):
        self.seen.append((tuple(input_ids.shape), self.training, torch.get_num_threads()))
        rows, tokens = input_ids.shape
        logits = self.logits.expand(rows, self.prompt + tokens, -1)
        return type("Output", (), {"logits": logits})


def rows(labels):
    ids = torch.tensor(labels).clamp(min=0)
    return Rows(ids, torch.tensor(labels))


@pytest.mark.parametrize("prompt", [0, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_loss_accuracy_and_tokens_against_hand_computed_numbers(prompt, batch_size):
    model = Fixed([0.0, 1.0, 2.0], prompt).train()
    result = evaluate(model, rows([[0, 1, 2], [0, -100, 2], [2, 2, 2]]), batch_size=batch_size, threads=1)
    total = torch.tensor([0.0, 1.0, 2.0]).logsumexp(0)
    want = float((total - 1) + 4 * (total - 2)) / 5  # labels 1, 2 | 2 | 2, 2
    assert result.loss == pytest.approx(want, rel=1e-6)
    assert result.tokens == 5
    assert result.accuracy == pytest.approx(4 / 5)
    assert model.training
    assert all(not training and threads == 1 for _, training, threads in model.seen)


def test_batches_do_not_change_the_bits(miniature):
    loaded = miniature("llama")
    data = torch.randint(3, 99, (7, 12), generator=torch.Generator().manual_seed(0))
    one = evaluate(loaded.model, Rows(data, data), batch_size=3, threads=1)
    assert one == evaluate(loaded.model, Rows(data, data), batch_size=3, threads=1)
    assert one.loss == pytest.approx(evaluate(loaded.model, Rows(data, data), batch_size=7, threads=1).loss, abs=1e-6)


def test_nothing_to_score_is_told():
    with pytest.raises(DataError, match="held-out"):
        evaluate(Fixed([0.0, 1.0]), rows([[0, -100]]), batch_size=1, threads=1)
