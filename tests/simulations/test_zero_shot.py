import dataclasses
import json
import math

import pytest

from fedpeat.core import Evaluation, StorageError
from simulations.zero_shot import cached_evaluation

KEY = {"model": "abc", "rows": 8, "threads": 1}
FOUND = Evaluation(loss=2.123456789012345, accuracy=0.3, tokens=77)


class Counted:
    """Makes an evaluation and counts how often."""

    def __init__(self, found=FOUND):
        self.found, self.times = found, 0

    def __call__(self):
        self.times += 1
        return self.found


def test_an_evaluation_is_made_once_and_read_to_the_bit(tmp_path):
    made = Counted()
    for _ in range(3):
        assert cached_evaluation(tmp_path / "deep" / "cache", KEY, made) == FOUND
    assert made.times == 1


def test_choices_are_kept_too(tmp_path):
    found = dataclasses.replace(FOUND, choice_accuracy=0.625)
    made = Counted(found)
    assert [cached_evaluation(tmp_path, KEY, made) for _ in range(2)] == [found, found]
    assert made.times == 1


def test_the_key_is_all_that_counts(tmp_path):
    made = Counted()
    for key in (KEY, {**KEY, "threads": 2}, {**KEY, "more": None}, ["abc", 8, 1], dict(reversed(KEY.items()))):
        cached_evaluation(tmp_path, key, made)
    assert made.times == 4  # the last one is the first in another order


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1, 2]",
        b"null",
        b"{}",
        b'{"evaluation": {"loss": 1.0}}',
        b'{"evaluation": {"loss": null, "accuracy": 0.5, "tokens": 3}}',
        b'{"evaluation": {"loss": "x", "accuracy": 0.5, "tokens": 3}}',
        b'{"evaluation": 3}',
        b'{"evaluation": {"loss": 1.0, "accuracy": 0.5, "tokens": 3, "choice_accuracy": "x"}}',
    ],
)
def test_a_damaged_file_is_made_anew(damage, tmp_path):
    made = Counted()
    cached_evaluation(tmp_path, KEY, made)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage)
    assert cached_evaluation(tmp_path, KEY, made) == FOUND
    assert cached_evaluation(tmp_path, KEY, made) == FOUND
    assert made.times == 2


@pytest.mark.parametrize(
    "found", [Evaluation(math.nan, 0.0, 3), Evaluation(math.inf, 0.0, 3), Evaluation(1.0, math.nan, 3)]
)
def test_what_is_not_finite_is_not_kept(found, tmp_path):
    made = Counted(found)
    for _ in range(2):
        assert cached_evaluation(tmp_path, KEY, made) is found
    assert made.times == 2
    assert list(tmp_path.iterdir()) == []


def test_the_file_says_what_it_is_of(tmp_path):
    cached_evaluation(tmp_path, KEY, Counted())
    (path,) = tmp_path.iterdir()
    kept = json.loads(path.read_text())
    assert kept["key"] == KEY
    assert kept["evaluation"]["perplexity"] == pytest.approx(math.exp(FOUND.loss))


def test_an_evaluation_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        cached_evaluation(tmp_path, KEY, lambda: 1 / 0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError):
        cached_evaluation(tmp_path / "file", KEY, Counted())
