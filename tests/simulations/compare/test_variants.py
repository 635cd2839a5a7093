import math

import pytest

from simulations.compare.collect import Run, read_run
from simulations.compare.table import columns
from simulations.compare.variants import Placed, compare
from simulations.compare.words import in_words, status_of


def by_value(comparison):
    return {next(iter(variant.values.values())): variant for variant in comparison.variants}


def table_of(comparison):
    shown = columns(comparison)
    return [{column.heading: column.words(variant) for column in shown} for variant in comparison.variants]


def missing(value, seed, tmp_path, key="strategy"):
    return Placed({key: value}, seed, read_run(tmp_path / "nowhere"))


def test_the_best_variant_comes_first_with_its_paired_difference(placed_runs):
    placed = placed_runs({"fed_avg": {0: 3.5, 1: 3.6, 2: 3.4}, "fed_adam": {0: 3.3, 1: 3.41, 2: 3.19}})
    found = compare(placed, title="x", metric="loss")
    first, second = found.variants
    assert first.label == "fed_adam"
    assert first.result.mean == pytest.approx(3.3)
    assert first.difference.mean == pytest.approx(-0.2)
    assert first.difference.half == pytest.approx(4.3026527 * 0.01 / math.sqrt(3), rel=1e-5)
    assert (first.verdict, second.verdict) == ("better", "baseline")
    assert "fed_adam is best" in in_words(found)
    assert "more than the noise" in in_words(found)


def test_a_difference_within_noise_is_called_so(placed_runs):
    found = compare(placed_runs({"a": {0: 3.5, 1: 3.4}, "b": {0: 3.3, 1: 3.45}}), title="x")
    assert by_value(found)["b"].verdict == "within noise"
    assert "no more than the noise" in in_words(found)
    worse = compare(placed_runs({"a": {0: 3.3, 1: 3.3}, "b": {0: 3.5, 1: 3.51}}), title="x")
    assert by_value(worse)["b"].verdict == "worse"
    assert "No variant is better" in in_words(worse)


def test_one_seed_says_nothing_of_noise(placed_runs):
    found = compare(placed_runs({"a": {0: 3.5}, "b": {0: 3.3}}), title="x")
    row = table_of(found)[0]
    assert row["beyond noise"] == "unknown (1 seed)"
    assert "±" not in row["perplexity"]
    assert "seeds" not in row
    assert any("One seed" in note for note in found.notes)
    assert "cannot tell" in in_words(found)


def test_another_baseline_may_be_named(placed_runs):
    found = compare(placed_runs({"a": {0: 3.5}, "b": {0: 3.3}}), title="x", baseline="b")
    assert by_value(found)["b"].verdict == "baseline"
    assert by_value(found)["a"].difference.mean > 0


def test_the_baseline_shares_all_keys_but_the_first(placed_runs):
    placed = []
    for rank, gain in (("4", 0.0), ("8", 0.3)):
        for one in placed_runs({"a": {0: 3.5 - gain, 1: 3.5 - gain}, "b": {0: 3.4 - gain, 1: 3.41 - gain}}):
            placed.append(Placed({**one.values, "rank": rank}, one.seed, one.run))
    found = compare(placed, title="x", metric="loss")
    for variant in found.variants:
        assert variant.target == pytest.approx(3.5 if variant.values["rank"] == "4" else 3.2)
        if variant.values["strategy"] == "b":
            assert variant.difference.mean == pytest.approx(-0.095)
    assert "target" in table_of(found)[0]


def test_divergence_sorts_last_and_is_shown(placed_runs):
    found = compare(placed_runs({"a": {0: 3.5, 1: 3.5}, "b": {0: math.nan, 1: 2.0}, "c": {0: 3.6, 1: 3.6}}), title="x")
    assert [variant.label for variant in found.variants] == ["a", "c", "b"]
    last = table_of(found)[-1]
    assert last["perplexity"] == "diverged in 1 of 2"
    assert last["vs. a"] == last["beyond noise"] == "—"
    assert any(note.startswith("diverged") for note in found.notes)


def test_an_overflowing_perplexity_is_divergence(placed_runs):
    found = compare(placed_runs({"a": {0: 3.5}, "b": {0: 800.0}}), title="x")
    assert table_of(found)[-1]["perplexity"] == "diverged"


def test_a_diverged_baseline_leaves_the_others_without_a_difference(placed_runs):
    found = compare(placed_runs({"a": {0: math.nan}, "b": {0: 3.0}}), title="x")
    assert by_value(found)["b"].difference is None
    assert by_value(found)["b"].target is None
    assert in_words(found) == "Only b reached perplexity 20.09, of one seed."
    three = compare(placed_runs({"a": {0: math.nan}, "b": {0: 3.0}, "c": {0: 3.1}}), title="x")
    assert "has no result to compare with" in in_words(three)


def test_failed_and_missing_runs_are_counted(placed_runs, tmp_path):
    placed = [
        *placed_runs({"a": {0: 3.5, 1: 3.5}, "b": {0: 3.4}}),
        missing("b", 1, tmp_path),
        missing("c", 0, tmp_path),
    ]
    failed = Run(tmp_path, {}, "failed", "no such rank")
    placed += [Placed({"strategy": "d"}, seed, failed) for seed in (0, 1)]
    found = compare(placed, title="x")
    rows = {row["strategy"]: row for row in table_of(found)}
    assert rows["b"]["seeds"] == "1 of 2"
    assert rows["c"]["perplexity"] == "not run"
    assert rows["d"]["perplexity"] == "failed"
    assert found.failures == [("d", [0, 1], "no such rank")]
    assert status_of(found) == ("failed", "3 of 7 runs finished, 2 not run, 2 failed")


def test_differences_use_the_seeds_that_both_have(placed_runs):
    found = compare(placed_runs({"a": {0: 3.0, 1: 4.0}, "b": {1: 3.9, 2: 1.0}}), title="x", metric="loss")
    assert by_value(found)["b"].difference == (pytest.approx(-0.1), None, 1)


def test_higher_accuracy_is_better(placed_runs):
    placed = placed_runs({"a": {0: 3.0, 1: 3.1}, "b": {0: 1.0, 1: 1.1}})
    found = compare(placed, title="x", metric="accuracy", target=0.45)
    assert [variant.label for variant in found.variants] == ["b", "a"]
    assert found.variants[0].result.mean == pytest.approx((1 / 2 + 1 / 2.1) / 2)
    assert found.variants[0].verdict == "better"
    assert [variant.rounds_to_target for variant in found.variants] == [2, None]


def test_right_answers_are_compared_where_there_are_any(write_run, tmp_path):
    write_run(tmp_path / "a", {"strategy": "a", "seed": 0}, choices=[0.5, 0.6])
    write_run(tmp_path / "b", {"strategy": "b", "seed": 0}, choices=[0.7, 0.75])
    write_run(tmp_path / "c", {"strategy": "c", "seed": 0})
    write_run(tmp_path / "d", {"strategy": "d", "seed": 0}, choices=[0.7, 0.8], personal=[3.3, 3.1])
    placed = [Placed({"strategy": name}, 0, read_run(tmp_path / name)) for name in "abcd"]
    found = compare(placed, title="x", metric="choice_accuracy", target=0.55)
    assert [variant.label for variant in found.variants][:2] == ["b", "a"]
    assert not found.lower_is_better
    assert by_value(found)["b"].difference.mean == pytest.approx(0.15)
    assert [by_value(found)[name].rounds_to_target for name in "ab"] == [2, 1]
    assert [by_value(found)[name].finals for name in "cd"] == [{}, {}], "clients' own models are not asked to choose"
    table = {row["strategy"]: row["choice accuracy"] for row in table_of(found)}
    assert table["c"] == table["d"] == "not evaluated"


def test_targets_are_reached_at_the_median_seed(placed_runs):
    placed = placed_runs({"a": {0: 3.5, 1: 3.5, 2: 3.9}})
    found = compare(placed, title="x", metric="loss", target=3.5)
    (variant,) = found.variants
    assert variant.rounds_to_target == 2
    first = placed[0].run.reports
    assert variant.bytes_to_target == sum(report.bytes_down + report.bytes_up for report in first)
    assert table_of(found)[0]["rounds to 3.500"] == "2 (2 of 3)"
    never = compare(placed, title="x", metric="loss", target=1.0)
    assert table_of(never)[0]["rounds to 1.000"] == "not reached"


def test_the_default_target_is_the_baselines_mean(placed_runs):
    found = compare(placed_runs({"a": {0: 3.4, 1: 3.6}, "b": {0: 3.4, 1: 3.6}}), title="x", metric="loss")
    assert [variant.target for variant in found.variants] == [pytest.approx(3.5)] * 2


def test_personal_models_are_judged_by_their_own_metric(write_run, tmp_path):
    write_run(tmp_path / "p", {"strategy": "p", "seed": 0}, losses=[3.6, 3.5], personal=[3.3, 3.1])
    write_run(tmp_path / "q", {"strategy": "q", "seed": 0}, losses=[3.6, 3.5])
    placed = [Placed({"strategy": name}, 0, read_run(tmp_path / name)) for name in "qp"]
    found = compare(placed, title="x", metric="loss")
    assert by_value(found)["p"].finals == {0: pytest.approx(3.1)}
    assert [point.value for point in placed[1].run.curve("loss")][1:] == pytest.approx([3.3, 3.1])
    assert by_value(found)["p"].difference is None, "it is scored on other text"
    assert table_of(found)[1]["loss"].endswith("(personal)"), "so it comes after those that compare"
    assert table_of(found)[1]["beyond noise"] == "other text"
    assert any(note.startswith("personal") for note in found.notes)


def test_costs_are_means_over_seeds(write_run, tmp_path):
    for seed, scale in enumerate((1.0, 3.0)):
        facts = {"aggregation_error": 0.01, "peak_rss_mib": 900.0 + seed, "seconds_total": 100.0 + 10 * seed}
        write_run(tmp_path / str(seed), {"seed": seed}, scale=scale, **facts)
    placed = [Placed({}, seed, read_run(tmp_path / str(seed))) for seed in (0, 1)]
    (variant,) = compare(placed, title="x").variants
    downs = [one.run.summary["bytes"]["down"] for one in placed]
    assert variant.costs["down"] == sum(downs) / 2
    assert downs[1] == 3 * downs[0]
    assert variant.costs["seconds"] == 105.0
    assert variant.costs["peak_rss_mib"] == 901.0
    assert variant.costs["aggregation_error"] == pytest.approx(0.015)  # mean of the rounds' 0.01 and 0.02
    headings = table_of(compare(placed, title="x"))[0]
    assert headings["aggregation error"] == "0.0150"
    assert "vs." not in "".join(headings)


def test_nothing_run_is_no_error(tmp_path):
    found = compare([missing("a", 0, tmp_path)], title="x")
    assert in_words(found) == "No variant has a result yet."
    assert table_of(found)[0]["perplexity"] == "not run"
