"""`report.html`: one page of a run that needs no other file, no network and no script."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from fedpeat.core import RoundReport, StorageError, read_json, write_text
from simulations.report import wording
from simulations.report.holdings import holdings
from simulations.report.simulated import simulated_table
from simulations.report.summary import in_words

PAGE = "report.html"
FIGURES = "figures"
DATA_PLOT = "clients.png"
EMULATORS = "emulator.json"
ROWS = 300
"""Longest table on the page; `metrics.jsonl` holds everything."""

SUMS = {"train_tokens": "tokens", "bytes_down": "down", "bytes_up": "up", "train_seconds": "seconds"}
"""Metrics that are added up over a client's visits, and their columns."""

DIFFERENCES = (
    ("privacy_margin", "privacy margin", "nats per token, up is better"),
    ("extraction_margin", "extraction margin", "nats per token, up is better"),
    ("transfer_gap", "transfer gap", "nats per token, down is better"),
    ("zero_shot_ratio", "zero-shot ratio", "emulator's perplexity over the full model's"),
)
CARDS = (
    ("plug_in", "Plug-in", "the owner's full model with the tuned adapter"),
    ("personal", "Personal", "each client's own model on its own text: only a simulation can score it"),
    ("emulator_tuned", "Emulated, tuned", "what a device holds after tuning"),
    ("full_zero_shot", "Full, zero-shot", "the owner's full model before tuning"),
    ("emulator_zero_shot", "Emulator, zero-shot", "what a device receives"),
)
WIDE = ("learning_curves", "right_answers", "emulator", "chosen")
"""Figures as wide as the page, by the start of their names."""
CAPTIONS = {
    "emulator": "The dropped blocks never leave the full model's owner; devices hold the others.",
    "distillation": "The emulator's own training on the server, before round 1.",
    "learning_curves": "Every model is scored on the same held-out text. Dashed levels do not change during the run.",
    "right_answers": "Each model picks the likeliest of the possible answers to the same held-out documents.",
    "privacy_margin": "Above zero, the full model stays worth more than what devices hold.",
    "simulated_time": "By the clock of the modelled devices: what they would have taken, not this machine.",
    "chosen": "The controller's plans: for which device and when. A dashed line: the emulator was re-aligned before.",
    "objective_terms": "What each round came to by the controller's objective, from the ledger and the evaluations.",
    "client_loss": "Loss in local training, each client on its own data.",
    "bytes": "Tensor payload, exact, without framing.",
    "seconds": "Wall time: training on clients, evaluation on the server, turning values into messages, the rest.",
}


def write_report(
    folder: str | Path,
    reports: Sequence[RoundReport],
    summary: Mapping[str, Any],
    *,
    settings: Mapping[str, Any],
    clients: Sequence[Mapping[str, Any]] = (),
    title: str = "",
) -> Path:
    """Write `report.html` and `figures/*.png` into a run's folder; works after an interruption too.

    A plot of the clients' data that is there already (`figures/clients.png`) comes onto the page, and so does what the
    emulators' builders made and found out (`emulator.json`).

    Args:
        folder: The run's folder.
        reports: The rounds that finished, oldest first; may be empty.
        summary: From `summarise`.
        settings: The resolved config, plain.
        clients: What each client holds, as `fedpeat.data.client_table` gives it.
        title: What the run is called; by default its folder's name.

    Returns:
        The page's path.

    Raises:
        StorageError: If the folder cannot be written.
    """
    from simulations.report import emulator_figures, figures, style  # matplotlib takes half a second to import

    folder = Path(folder)
    drawn = figures.draw(reports, summary) | emulator_figures.draw_emulators(_emulators(folder / EMULATORS))
    for name, figure in drawn.items():
        style.write_png(figure, folder / FIGURES / f"{name}.png")
    page = _render(
        reports,
        summary,
        config_text=yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, width=100),
        title=title or folder.resolve().name,
        drawings={name: style.to_svg(figure, name=name) for name, figure in drawn.items()},
        palette=style.PALETTE,
        data_plot=_data_uri(folder / FIGURES / DATA_PLOT),
        clients=client_rows(reports, clients),
    )
    write_text(folder / PAGE, page)
    return folder / PAGE


def _render(
    reports: Sequence[RoundReport],
    summary: Mapping[str, Any],
    *,
    drawings: Mapping[str, str],
    clients: Sequence[Mapping[str, Any]],
    **more: Any,
) -> str:
    """Return the page. Everything but our own `drawings` is escaped: names and settings come from users."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = ("number", "count", "percent", "size", "duration", "printable")
    environment.filters.update({name: getattr(wording, name) for name in names})
    failures = [failure for report in reports for failure in report.failures]
    page = environment.get_template("template.html.j2").render(
        sentence=in_words(summary),
        summary=summary,
        cards=[
            (name, label, meaning, summary["metrics"][name])
            for name, label, meaning in CARDS
            if name in summary["metrics"]
        ],
        facts=_facts(summary),
        holdings=holdings(summary),
        simulated=simulated_table(summary),
        figures=[(name, Markup(svg), _caption(name), name.startswith(WIDE)) for name, svg in drawings.items()],
        clients=clients[:ROWS],
        more_clients=len(clients[ROWS:]),
        failures=failures[:ROWS],
        more_failures=len(failures[ROWS:]),
        rounds=_round_rows(reports)[-ROWS:],
        answers=any(row["answers"] is not None for row in _round_rows(reports)),
        **more,
    )
    return page.encode("utf-8", "replace").decode()


def _caption(name: str) -> str:
    """Return what is said under a figure; those of further emulators are named by their key as well."""
    return CAPTIONS[name] if name in CAPTIONS else CAPTIONS[name.partition("_")[0]]


def client_rows(reports: Sequence[RoundReport], clients: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """Return one row a participant, those with most rows first: what it holds, did, moved, and how often it failed."""
    rows: dict[str, dict[str, Any]] = {}

    def row(name: str) -> dict[str, Any]:
        nothing = dict.fromkeys(SUMS.values(), 0.0)
        return rows.setdefault(name, {"name": name, "rows": None, "visits": 0, "failures": 0, "losses": [], **nothing})

    for client in clients:
        row(client["client"])["rows"] = client["rows"]
    for report in reports:
        for name, metrics in report.clients.items():
            one = row(name)
            one["visits"] += 1
            one["rows"] = metrics.get("train_rows", one["rows"])
            one["losses"] += [metrics["train_loss"]] if "train_loss" in metrics else []
            for metric, key in SUMS.items():
                one[key] += metrics.get(metric, 0.0)
        for failure in report.failures:
            row(failure.client)["failures"] += 1
    for one in rows.values():
        losses = one.pop("losses")
        one["loss"] = sum(losses) / len(losses) if losses else None
        one["last_loss"] = losses[-1] if losses else None
    return sorted(rows.values(), key=lambda one: (-(one["rows"] or 0), one["name"]))


def _round_rows(reports: Sequence[RoundReport]) -> list[dict[str, Any]]:
    return [
        {
            "round": report.round,
            "plug_in": _perplexity(report, "plug_in"),
            "emulator_tuned": _perplexity(report, "emulator_tuned"),
            "answers": report.evaluations["plug_in"].choice_accuracy if "plug_in" in report.evaluations else None,
            "train_loss": report.metrics.get("train_loss"),
            "clients": len(report.clients),
            "failures": len(report.failures),
            "down": report.bytes_down,
            "up": report.bytes_up,
            "seconds": report.seconds.get("total"),
        }
        for report in reports
    ]


def _perplexity(report: RoundReport, model: str) -> float | None:
    return report.evaluations[model].perplexity if model in report.evaluations else None


def _compared(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the facts that set the plug-in beside what else there is."""
    found = {name: summary.get(name) for name in ("privacy_margin", "extraction_margin", "transfer_gap")}
    found["zero_shot_ratio"] = summary["emulator"].get("zero_shot_ratio")
    facts = [(name, wording.number(found[key]), said) for key, name, said in DIFFERENCES if found[key] is not None]
    if "privacy_margin_accuracy" in summary:
        points = wording.number(100 * summary["privacy_margin_accuracy"])
        facts.append(("privacy margin, answers", points, "points of right answers, up is better"))
    baselines = summary["baselines"]
    if "extraction" in baselines:
        one = baselines["extraction"]
        remark = f"perplexity; {wording.printable(one['client'], 24)}, {one['steps']} steps on all it holds"
        facts.append(("curious client", wording.number(one["perplexity"]), remark))
    if "local_only" in baselines:
        remark = f"perplexity, mean of {len(baselines['local_only']['clients'])} clients"
        facts.append(("clients alone", wording.number(baselines["local_only"]["mean"]["perplexity"]), remark))
    if "whole_model" in baselines:
        facts.append(("whole model tuned", wording.number(baselines["whole_model"]["perplexity"]), "perplexity"))
    return facts


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return what stands under the cards: a name, a value, a remark."""
    facts = _compared(summary)
    seconds, moved = summary["seconds"], summary["bytes"]
    split = ", ".join(f"{part} {wording.duration(seconds[part])}" for part in ("train", "evaluate") if seconds[part])
    facts += [
        (
            "down / up",
            f"{wording.size(moved['down'])} / {wording.size(moved['up'])}",
            "tensors, all clients and rounds",
        ),
        ("bundle", wording.size(moved["bundle"]), "once a device"),
        ("time", wording.duration(seconds["total"]), split or "nothing ran"),
    ]
    if "privacy" in summary:
        facts.append(_epsilon(summary["privacy"]))
    if summary["tokens_per_second"]:
        facts.append(("speed", f"{wording.count(summary['tokens_per_second'])} tokens/s", "in training, all clients"))
    for key, name, remark in (
        ("peak_rss_mib", "peak memory", "largest process"),
        ("peak_gpu_mib", "peak GPU memory", "largest process"),
    ):
        if summary[key]:
            facts.append((name, wording.size(summary[key] * 2**20), remark))
    return facts


def _epsilon(privacy: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the fact of differential privacy."""
    norm = f"clip norm {wording.number(privacy['clip_norm'])}" + (" at first" if privacy["adaptive"] else "")
    noise = f"noise multiplier {wording.number(privacy['noise_multiplier'])}, {norm}"
    value = "∞" if privacy["epsilon"] is None else wording.number(privacy["epsilon"])
    return "epsilon", value, f"delta {privacy['delta']:g}, {privacy['neighbours']}; {noise}"


def _emulators(path: Path) -> Mapping[str, Any]:
    """Return what is kept of the emulators; nothing where that is missing, or not what it should be."""
    try:
        plain = read_json(path)
    except StorageError:
        return {}
    return plain if isinstance(plain, dict) else {}


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" if path.is_file() else ""
