import numpy as np
import pytest
from datasets import Dataset

from fedpeat.core import DataError
from fedpeat.data.histogram import MOST_LABELS, OTHER, count_labels


def count(values, owners, field="label"):
    return count_labels(Dataset.from_dict({"label": values}), field, [np.array(rows, dtype=int) for rows in owners])


def test_each_owners_documents_are_counted_in_one_order():
    counted = count([10, 2, 2, 10, 2], [[0, 1], [2, 3, 4], []])
    assert counted == [{"2": 1, "10": 1}, {"2": 2, "10": 1}, {"2": 0, "10": 0}]
    assert list(counted[0]) == ["2", "10"]
    assert list(count(["b", None, "a"], [[0, 1, 2]])[0]) == ["(none)", "a", "b"]


def test_without_a_field_there_is_no_histogram():
    assert count([1], [[0]], field=None) == []
    with pytest.raises(DataError, match="did you mean 'label'"):
        count([1], [[0]], field="lable")


def test_rare_labels_are_counted_together():
    values = [f"w{i:03d}" for i in range(100)] + ["often"] * 5
    (counted,) = count(values, [range(105)])
    assert len(counted) == MOST_LABELS + 1
    assert (counted["often"], counted[OTHER], sum(counted.values())) == (5, 101 - MOST_LABELS, 105)


def test_real_numbers_are_counted_in_bins():
    (counted,) = count([i / 100 for i in range(100)] + [None], [range(101)])
    assert list(counted)[:2] == ["0 to 0.099", "0.099 to 0.198"]
    assert len(counted) == 11
    assert sum(counted.values()) == 101
