import math

import pytest

from fedpeat.core import StorageError
from simulations.compare.statistics import t_quantile
from simulations.compare.table import MINUS
from simulations.study.again import read_planned
from simulations.study.table import columns, told_of
from simulations.study.words import sentences

AXES = {"selection": ["uniform", "cka"], "kept": ["2"]}


def setup(name, losses, role="setup", **more):
    return ({"selection": name, "kept": "2" if role == "setup" else "—"}, role, losses, more)


def table_of(study):
    shown = columns(study)
    return [{column.heading: column.words(row) for column in shown} for row in told_of(study).rows]


def by_label(study):
    return {each.label: each for each in (*study.setups, *study.references)}


def test_measures_are_means_with_intervals_over_seeds(made, read):
    found = by_label(read(made))["uniform, kept 2"]
    # 3.5 - 0.05 + seed / 10, and 0.005 more for seed 1.
    values = [3.45, 3.555, 3.65]
    mean = sum(values) / 3
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / 2)
    assert found.result.mean == pytest.approx(mean)
    assert found.result.half == pytest.approx(t_quantile(2) * spread / math.sqrt(3))
    assert found.mean("privacy_margin") == pytest.approx(-0.02)
    assert found.mean("emulated") == pytest.approx(mean - 0.02)
    assert found.mean("step_seconds") == pytest.approx(0.11)
    assert found.mean("kept_share") == 0.25


def test_setups_are_ordered_and_set_beside_the_best(made, read):
    study = read(made)
    assert [each.label for each in study.setups] == [
        *("uniform, kept 4", "uniform, kept 2", "cka, kept 4", "cka, kept 2"),
    ]
    best, second, third, _ = study.setups
    assert (best.verdict, best.behind) == ("best", None)
    # Seed by seed: 0.05 apart, and 0.005 less for seed 1.
    differences = [0.05, 0.045, 0.05]
    mean = sum(differences) / 3
    spread = math.sqrt(sum((value - mean) ** 2 for value in differences) / 2)
    assert second.behind == (pytest.approx(mean), pytest.approx(t_quantile(2) * spread / math.sqrt(3)), 3)
    assert second.verdict == "worse"
    assert third.behind.mean == pytest.approx(0.1)
    assert [each.verdict for each in study.references] == ["reference", "reference"]


def test_the_gap_is_to_the_same_seed_of_the_whole_model(made, read):
    found = by_label(read(made))
    gaps = found["uniform, kept 4"].measures["transfer_gap"]
    assert gaps == {0: pytest.approx(0.1), 1: pytest.approx(0.11), 2: pytest.approx(0.1)}
    assert found["whole model, full"].mean("transfer_gap") == pytest.approx(-0.1)
    assert "transfer_gap" not in found["whole model, LoRA"].measures


def test_seeds_that_only_one_has_are_not_paired(study_folder, read):
    cells = [
        setup("uniform", {0: 3.0, 1: 3.2}),
        setup("cka", {1: 3.3, 2: 9.0}),
        setup("whole model, LoRA", {0: 2.5}, "whole"),
    ]
    found = by_label(read(study_folder(cells, AXES)))
    assert found["cka, kept 2"].behind == (pytest.approx(0.1), None, 1)
    assert found["cka, kept 2"].verdict == "unknown"
    assert found["uniform, kept 2"].measures["transfer_gap"] == {0: pytest.approx(0.5)}
    assert "transfer_gap" not in found["cka, kept 2"].measures


def test_a_gap_is_found_within_the_same_data_only(study_folder, read):
    cells = [
        ({"selection": name, "kept": kept, "data.path": path}, role, {0: loss}, {})
        for path, shift in (("a", 0.0), ("b", 1.0))
        for name, kept, role, loss in (
            ("uniform", "2", "setup", 3.0 + shift),
            ("cka", "2", "setup", 3.1 + shift),
            ("whole model, LoRA", "—", "whole", 2.9 + 2 * shift),
        )
    ]
    study = read(study_folder(cells, AXES))
    found = by_label(study)
    assert found["uniform, kept 2, a"].mean("transfer_gap") == pytest.approx(0.1)
    assert found["uniform, kept 2, b"].mean("transfer_gap") == pytest.approx(-0.9)
    assert found["uniform, kept 2, b"].verdict == "best", "another text is another contest"
    assert found["cka, kept 2, b"].behind.mean == pytest.approx(0.1)
    assert [len(part.setups) for part in study.parts] == [2, 2]
    assert len([text for text in sentences(study) if "is best" in text]) == 2


def test_the_table_tells_it_in_words(made, read):
    rows = table_of(read(made))
    assert [row["selection"] for row in rows[-2:]] == ["whole model, LoRA", "whole model, full"]
    best = rows[0]
    assert (best["selection"], best["kept"], best["beyond noise"]) == ("uniform", "4", "best")
    assert best["plug-in loss"].startswith("3.50 ± ")
    assert best["behind the best"] == "—"
    assert rows[1]["behind the best"].startswith("+0.048")
    assert rows[1]["beyond noise"] == "yes, worse"
    assert rows[1]["privacy margin"].startswith(f"{MINUS}0.02")
    assert best["parameters"] == "500 (50 %)"
    assert best["bundle"] == "6.00 KiB (75 %)"
    assert best["memory"] == "1.50 MiB (38 %)"
    assert best["step"] == "0.110 s (22 %)"
    assert best["before tuning"] == "4.500"
    assert rows[-2]["memory"] == "4.00 MiB"
    assert rows[-2]["privacy margin"] == rows[-2]["emulated"] == "—"
    assert "curious client" not in best
    assert "seeds" not in best


def test_what_an_extraction_reached_has_a_column(study_folder, read):
    probe = {"extraction": {"loss": 3.3, "perplexity": 27.1, "accuracy": 0.2}}
    study = read(study_folder([setup("uniform", {0: 3.0}, baselines=probe, extraction_margin=0.3)], AXES))
    assert table_of(study)[0]["curious client"] == "3.300"
    assert study.setups[0].mean("extraction_margin") == 0.3


def test_failures_and_divergence_are_told_and_come_last(study_folder, read):
    cells = [
        setup("cka", {0: "no such block", 1: "no such block"}),
        setup("uniform", {0: math.nan, 1: 3.0}, emulated=3.0),
        setup("first", {0: 3.2, 1: 3.3}),
        setup("last", {0: 3.1, 1: "out of memory"}),
    ]
    study = read(study_folder(cells, {**AXES, "selection": ["cka", "uniform", "first", "last"]}))
    rows = {row["selection"]: row for row in table_of(study)}
    assert list(rows) == ["last", "first", "uniform", "cka"]
    assert rows["uniform"]["plug-in loss"] == "diverged in 1 of 2"
    assert rows["cka"]["plug-in loss"] == "failed"
    assert rows["last"]["seeds"] == "1 of 2"
    assert study.comparison.failures[0] == ("last, kept 2", [1], "out of memory")
    assert study.comparison.failures[1] == ("cka, kept 2", [0, 1], "no such block")


def test_sentences_say_what_is_best_beyond_noise(made, read):
    told = sentences(read(made))
    assert told[0].startswith("uniform, kept 4 is best: plug-in loss 3.50")
    assert "better than all others by more than the noise" in told[0]
    assert any("In 2 of 4 setups plugging in raises the loss" in text for text in told)
    assert any("uniform, kept 2 and cka, kept 2" in text and f"{MINUS}0.02" in text for text in told)
    last = told[-1]
    assert "Whole model, LoRA reaches 3.40" in last
    assert "the full model before tuning has 4.000" in last
    assert "loss is 0.103 ± 0.014 nats/token" in last
    assert "above that of whole model, LoRA, beyond noise" in last


def test_sentences_say_what_cannot_be_told_apart_and_is_cheaper(study_folder, read):
    cells = [
        setup("uniform", {0: 3.0, 1: 3.2, 2: 3.1}, memory=3 * 2**20),
        setup("cka", {0: 3.2, 1: 3.1, 2: 3.15}, memory=2**20),
        setup("first", {0: 4.0, 1: 4.2, 2: 4.1}, memory=2**19),
    ]
    told = sentences(read(study_folder(cells, {**AXES, "selection": ["uniform", "cka", "first"]})))
    assert "better than 1 of 2 others by more than the noise between seeds; cka, kept 2 cannot be told" in told[0]
    assert "Of these, cka, kept 2 needs the least memory to train: 1.00 MiB, 25 % of the full model's" in told[1]
    assert told[2].startswith("Everywhere the plug-in model has a lower loss")


def test_one_seed_cannot_tell(study_folder, read):
    told = sentences(read(study_folder([setup("uniform", {0: 3.0}), setup("cka", {0: 3.1})], AXES)))
    assert "one seed cannot tell" in told[0]


def test_one_setup_is_not_called_best(study_folder, read):
    told = sentences(read(study_folder([setup("uniform", {0: 3.0})], AXES)))
    assert told[0] == "uniform, kept 2 reaches plug-in loss 3.000, of one seed."


def test_nothing_run_is_no_error(study_folder, read):
    study = read(study_folder([setup("uniform", {0: "boom"})], AXES))
    assert sentences(study) == ["No setup has a result yet."]
    assert table_of(study)[0]["plug-in loss"] == "failed"


def test_accuracy_is_better_when_higher(made, read):
    study = read(made, metric="accuracy")
    assert not study.lower_is_better
    assert study.setups[0].label == "uniform, kept 4"
    assert study.setups[1].behind.mean < 0
    assert study.setups[1].verdict == "worse"


def test_a_metric_that_was_not_measured_is_told(made, read):
    study = read(made, metric="choice_accuracy")
    assert {each.verdict for each in study.setups} == {""}
    assert table_of(study)[0]["plug-in choice accuracy"] == "—"


def test_a_damaged_plan_is_told(tmp_path):
    (tmp_path / "plan.json").write_text('{"kind": "study", "cells": [{}]}')
    with pytest.raises(StorageError, match=r"plan\.json"):
        read_planned(tmp_path)
