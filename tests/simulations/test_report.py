import dataclasses
import itertools
import json
import math
import re
from html.parser import HTMLParser

import pytest

from fedpeat.core import Evaluation, StorageError, write_json
from simulations.report import in_words, printable, summarise, write_report
from simulations.report.figures import draw
from simulations.report.html import client_rows
from simulations.report.style import PALETTE, spread, to_svg, write_png
from simulations.report.wording import change, duration, number, size

VOID = {"meta", "img", "br", "hr", "link", "input"}
ALONE = {
    "mean": Evaluation(3.51, 0.3, 48_000).to_json(),
    "clients": {"sympy": Evaluation(3.51, 0.3, 48_000).to_json()},
}
WHOLE = Evaluation(3.28, 0.34, 48_000).to_json()


def summary_of(reports, **more):
    facts = {"config_hash": "5f3a", "versions": {"torch": "2.13.0"}, "status": "finished", "bundle_bytes": 4_312_344}
    return summarise(reports, **{**facts, **more})


def with_loss(report, **losses):
    found = {name: Evaluation(loss, 0.3, 9) for name, loss in losses.items()}
    return dataclasses.replace(report, evaluations={**report.evaluations, **found})


class Page(HTMLParser):
    """Checks that tags match, and collects what a page shows and asks for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def report_page(folder, reports, **more):
    summary = more.pop("summary", None) or summary_of(reports)
    page = write_report(folder, reports, summary, settings=more.pop("settings", {"seed": 1}), **more)
    return page.read_text(encoding="utf-8")


# summary


def test_summary_has_the_promised_names(make_reports):
    summary = summary_of(make_reports(5), baselines={"local_only": ALONE, "whole_model": WHOLE})
    for model in ("full_zero_shot", "emulator_zero_shot", "emulator_tuned", "plug_in"):
        assert {"loss", "perplexity", "accuracy"} <= summary["metrics"][model].keys()
    assert {"down", "up", "bundle"} <= summary["bytes"].keys()
    assert {"total", "train", "evaluate", "wire", "overhead"} <= summary["seconds"].keys()
    expected = {"tokens_per_second", "peak_rss_mib", "clients_failed", "rounds", "config_hash", "versions", "status"}
    assert expected <= summary.keys()
    assert summary["rounds"] == 5
    assert summary["participants"] == 8
    assert summary["privacy_margin"] == pytest.approx(
        summary["metrics"]["emulator_tuned"]["loss"] - summary["metrics"]["plug_in"]["loss"]
    )
    assert summary["transfer_gap"] == pytest.approx(summary["metrics"]["plug_in"]["loss"] - 3.28)
    assert summary["baselines"]["local_only"] == ALONE


def test_right_answers_are_told_wherever_there_are_any(make_reports, tmp_path):
    shares = {"full_zero_shot": 0.25, "emulator_tuned": 0.5, "plug_in": 0.625}
    reports = [
        dataclasses.replace(
            report,
            evaluations={
                name: dataclasses.replace(found, choice_accuracy=shares.get(name))
                for name, found in report.evaluations.items()
            },
        )
        for report in make_reports(2)
    ]
    alone = {**ALONE, "mean": {**ALONE["mean"], "choice_accuracy": 0.375}}
    summary = summary_of(reports, baselines={"local_only": alone, "whole_model": WHOLE})
    assert summary["metrics"]["plug_in"]["choice_accuracy"] == 0.625
    assert "choice_accuracy" not in summary["metrics"]["emulator_zero_shot"]
    assert summary["privacy_margin_accuracy"] == 0.125
    assert in_words(summary).endswith(
        "The plug-in gets 62 % of the answers right (the full model before tuning 25 %, the emulated one 50 %, clients"
        " alone 38 %)."
    )
    assert in_words(summary_of(reports[:1])).endswith("It gets 62 % of the answers right.")
    page = report_page(tmp_path / "with", reports, summary=summary)
    assert page.count("answers 62 % right") == 1
    assert page.count("<td>62 %</td>") == 3
    assert "points of right answers" in page
    assert "Each model picks the likeliest" in page
    assert "right_answers" in draw(reports, summary)
    assert "right_answers" not in draw(make_reports(2), summary_of(make_reports(2)))
    plain = report_page(tmp_path / "without", make_reports(2))
    assert "right" not in plain.split("</style>")[1].split("<details>")[0].split("<figure")[0]
    assert "right answers" not in plain
    assert "answers" not in in_words(summary_of(make_reports(2)))


def test_summary_adds_up(make_reports):
    failures = {2: [("sympy", "timeout", "late"), ("ray", "error", "broken")], 3: [("ray", "error", "broken")]}
    reports = make_reports(5, failures=failures)
    summary = summary_of(reports, peak_rss_mib=700.0)
    assert summary["bytes"]["up"] == 5 * 8 * 1_179_648
    assert summary["train_tokens"] == 5 * 8 * 10_240
    train = sum(report.seconds["train"] for report in reports)
    assert summary["tokens_per_second"] == pytest.approx(summary["train_tokens"] / train)
    assert summary["seconds"]["total"] == pytest.approx(sum(report.seconds["total"] for report in reports))
    assert summary["peak_rss_mib"] == 801.5
    assert summary_of(reports, peak_rss_mib=900.0)["peak_rss_mib"] == 900.0
    assert summary["clients_failed"] == 3
    assert summary["failures"] == {"timeout": 1, "error": 2}


def test_set_up_counts_as_overhead(make_reports):
    reports = make_reports(2)
    inside, whole = summary_of(reports)["seconds"], summary_of(reports, seconds_total=1000.0)["seconds"]
    assert whole["total"] == 1000.0
    parts = ("train", "evaluate", "wire", "overhead")
    assert sum(whole[part] for part in parts) == pytest.approx(1000.0)
    assert whole["overhead"] > inside["overhead"]


def test_the_newest_evaluation_counts(make_reports):
    reports = make_reports(7, evaluate_every=3)[:6]  # interrupted after round 5, evaluated after rounds 0 and 3
    summary = summary_of(reports, status="interrupted", rounds_planned=7)
    assert (summary["rounds"], summary["rounds_planned"], summary["evaluated_round"]) == (5, 7, 3)
    assert summary["metrics"]["plug_in"]["loss"] == reports[3].evaluations["plug_in"].loss


def test_a_summary_of_nothing_has_all_names(tmp_path):
    summary = summary_of([], status="failed")
    assert summary["rounds"] == 0
    assert summary["metrics"]["plug_in"] == {"loss": None, "perplexity": None, "accuracy": None, "tokens": None}
    assert summary["evaluated_round"] is None
    assert summary["tokens_per_second"] == 0.0
    assert "privacy_margin" not in summary
    write_json(tmp_path / "summary.json", summary)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_further_emulators_stand_beside_the_four(make_reports):
    reports = [with_loss(report, **{"emulator_tuned/small": 3.9}) for report in make_reports(2)]
    assert summary_of(reports)["metrics"]["emulator_tuned/small"]["loss"] == 3.9


# words


def test_words_compare_the_plug_in_with_everything_known(make_reports):
    baselines = {"local_only": ALONE, "whole_model": WHOLE}
    words = in_words(summary_of(make_reports(5), baselines=baselines))
    assert words == (
        "Plug-in perplexity 29.3 is 37 % below the full model's 46.6 before tuning. "
        "The emulated model, all that a device holds, reaches 30.7 (the plug-in is 4.8 % below). "
        "Clients tuning alone reach 33.4 (the plug-in is 12 % below). "
        "Tuning the whole model directly reaches 26.6 (the plug-in is 10 % above)."
    )


def test_words_say_what_went_wrong(make_reports):
    assert "not evaluated" in in_words(summary_of([]))
    assert "No round was trained" in in_words(summary_of(make_reports(0)))
    assert "33.4" in in_words(summary_of(make_reports(0), baselines={"local_only": ALONE}))
    worse = [with_loss(make_reports(1)[-1], plug_in=4.2)]
    assert "43 % above the full model's 46.6" in in_words(summary_of(worse))
    for loss in (math.nan, math.inf, 1e6):
        assert "diverged" in in_words(summary_of([with_loss(make_reports(1)[-1], plug_in=loss)]))
    alone = make_reports(3, models=("plug_in",))
    assert in_words(summary_of(alone)) == "Plug-in perplexity is 29.3."


def test_numbers_in_words():
    assert [number(value) for value in (0.000012, 9.996, 99.97, 12345, -0.5, math.nan)] == [
        "1.20e-05", "10.0", "100", "12,345", "-0.500", "—",
    ]  # fmt: skip
    assert [size(value) for value in (0, 1023, 1024, 5 * 2**40)] == ["0 B", "1023 B", "1.00 KiB", "5.00 TiB"]
    assert [duration(value) for value in (0, 59.99, 3599.6, 360_000)] == [
        "0 s",
        "1 min 00 s",
        "1 h 00 min",
        "100 h 00 min",
    ]
    assert [change(1, value) for value in (0, math.nan)] == ["not to be compared with"] * 2


def test_names_become_printable(hostile_names):
    for name in hostile_names:
        shown = printable(name)
        assert 0 < len(shown) <= 40
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)
        shown.encode("utf-8")


# figures


CASES = {
    "demo": {"rounds": 8},
    "many": {
        "rounds": 41,
        "clients": [f"client {number}" for number in range(300)],
        "per_round": 20,
        "evaluate_every": 10,
    },
    "one client": {"rounds": 3, "clients": ["only"]},
    "before training": {"rounds": 0},
    "no evaluation": {"rounds": 3, "models": ()},
    "plug-in alone": {"rounds": 3, "models": ("full_zero_shot", "plug_in")},
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_run_can_be_drawn(make_reports, tmp_path, case):
    reports = make_reports(**CASES[case])
    figures = draw(reports, summary_of(reports, baselines={"local_only": ALONE, "whole_model": WHOLE}))
    evaluated, trained = bool(reports[0].evaluations), len(reports) > 1
    assert ("learning_curves" in figures) == evaluated
    assert ("privacy_margin" in figures) == ("emulator_tuned" in reports[0].evaluations)
    assert ("client_loss" in figures) == ("bytes" in figures) == trained
    assert "seconds" in figures
    for name, figure in figures.items():
        write_png(figure, tmp_path / "figures" / f"{name}.png")
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw_is_no_figure():
    assert draw([], summary_of([])) == {}


def test_drawings_are_for_light_and_dark_and_the_same_each_time(make_reports):
    reports = make_reports(3)
    first, second = (draw(reports, summary_of(reports)) for _ in range(2))
    for name, figure in first.items():
        svg = to_svg(figure, name=name)
        assert svg == to_svg(second[name], name=name)
        assert svg.startswith("<svg viewBox=")
        assert not re.search(r"#[0-9a-f]{6}|https?:|font-family|<metadata", svg)
        assert set(re.findall(r"var\(--(\w+)\)", svg)) <= set(PALETTE)
        Page(svg)


def test_drawings_survive_hostile_names_and_numbers(make_reports, hostile_names):
    reports = make_reports(4, clients=hostile_names)
    reports[2] = with_loss(reports[2], plug_in=math.nan, emulator_tuned=math.inf)
    clients = {name: {**metrics, "train_loss": math.nan} for name, metrics in reports[3].clients.items()}
    reports[3] = dataclasses.replace(reports[3], clients=clients, seconds={"train": math.nan, "total": 1.0})
    for name, figure in draw(reports, summary_of(reports)).items():
        assert "<script" not in to_svg(figure, name=name)


def test_colours_differ():
    assert len({light for light, _ in PALETTE.values()}) == len(PALETTE)


def test_names_at_the_ends_of_lines_keep_apart():
    wanted = [0.0, 0.01, 0.02, 0.5, 0.9, 0.91]
    places = spread(wanted, gap=0.1)
    assert all(high - low > 0.0999 for low, high in itertools.pairwise(places))
    assert sum(places) == pytest.approx(sum(wanted))


def test_a_full_disk_is_told_of(make_reports, tmp_path):
    (tmp_path / "figures").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        report_page(tmp_path, make_reports(1))


# page


def test_the_page_is_whole_and_needs_nothing_else(make_reports, tmp_path):
    reports = make_reports(5, failures={3: [("pandas", "timeout", "no reply within 60 s")]})
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "clients.png").write_bytes(b"\x89PNG")
    text = report_page(tmp_path, reports, title="a run")
    page = Page(text)
    shown = " ".join(" ".join(page.words).split())
    for words in (
        "a run",
        "29.3",
        "46.6",
        "37 % below",
        "pandas",
        "no reply within 60 s",
        "4.11 MiB",
        "seed: 1",
        "5f3a",
    ):
        assert words in shown
    assert page.tags.count("svg") == 5
    assert "script" not in page.tags
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert sum(link.startswith("data:") for link in links) == 1
    assert "://" not in text
    names = ["bytes", "client_loss", "clients", "learning_curves", "privacy_margin", "seconds"]
    assert sorted(path.stem for path in (tmp_path / "figures").glob("*.png")) == names


@pytest.mark.parametrize(
    ("case", "status"),
    [("before training", "interrupted"), ("no evaluation", "interrupted"), ("plug-in alone", "failed")],
)
def test_the_page_of_a_run_that_lacks_something(make_reports, tmp_path, case, status):
    reports = make_reports(**CASES[case])
    text = report_page(tmp_path, reports, summary=summary_of(reports, status=status, rounds_planned=9))
    assert f"{status} after round {len(reports) - 1} of 9" in text
    Page(text)


def test_the_page_of_nothing(tmp_path):
    page = Page(report_page(tmp_path, [], summary=summary_of([], status="failed")))
    assert page.tags.count("svg") == 0
    assert not (tmp_path / "figures").exists()


def test_the_page_of_a_run_that_diverged(make_reports, tmp_path):
    reports = [with_loss(report, plug_in=math.nan) for report in make_reports(2)]
    assert "diverged" in " ".join(Page(report_page(tmp_path, reports)).words)


def test_what_users_name_is_escaped(make_reports, tmp_path, hostile_names):
    reason = "<img src=x onerror=alert(1)>\n\x1b[31m"
    reports = make_reports(3, clients=hostile_names, failures={2: [(hostile_names[0], "error", reason)]})
    settings = {"name": "</pre><script>alert(2)</script>"}
    text = report_page(tmp_path, reports, settings=settings, title="<b>title</b>")
    page = Page(text)
    assert not {"script", "b\x3e", "img"} & set(page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "default-src 'none'" in text
    shown = "".join(page.words)
    for words in ("<script>alert(1)</script>", "<b>title</b>", "{{ 7 * 7 }}", "alert(2)", "哈姆雷特"):
        assert words in shown
    assert "\x1b" not in text


def test_long_tables_are_cut_and_say_so(make_reports, tmp_path):
    names = [f"client {number}" for number in range(400)]
    failures = {number: [(name, "error", "no memory") for name in names[:8]] for number in range(1, 51)}
    reports = make_reports(50, clients=names, per_round=40, failures=failures)
    text = report_page(tmp_path, reports)
    assert f"and {len(client_rows(reports)) - 300} more with fewer rows" in text
    assert text.count('<td class="left name"') == 600
    assert "and 100 more, in metrics.jsonl" in text


def test_client_rows_count_visits_and_know_those_never_visited(make_reports):
    reports = make_reports(4, clients=("a", "b"), failures={1: [("c", "died", "gone")], 2: [("a", "error", "no")]})
    held = [{"client": "never", "rows": 9999}, {"client": "a", "rows": 5}]
    rows = {row["name"]: row for row in client_rows(reports, held)}
    assert next(iter(rows)) == "never"
    assert (rows["a"]["visits"], rows["a"]["failures"], rows["a"]["up"]) == (4, 1, 4 * 1_179_648)
    assert (rows["c"]["visits"], rows["c"]["failures"], rows["c"]["loss"]) == (0, 1, None)
    assert (rows["never"]["visits"], rows["never"]["rows"]) == (0, 9999)
    losses = [report.clients["b"]["train_loss"] for report in reports[1:]]
    assert rows["b"]["loss"] == pytest.approx(sum(losses) / 4)
    assert rows["b"]["last_loss"] == losses[-1]
