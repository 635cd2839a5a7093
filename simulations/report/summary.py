"""A run in one dictionary: `summary.json`, and what it says in words."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from fedpeat.core import RoundReport
from fedpeat.server import margins
from simulations.report.chosen import control_facts
from simulations.report.simulated import simulated
from simulations.report.wording import change, number, percent

MODELS = ("full_zero_shot", "emulator_zero_shot", "emulator_tuned", "plug_in")
SECONDS = ("total", "train", "evaluate", "wire", "overhead")
STATUSES = ("finished", "interrupted", "failed")
BASELINES = {
    "local_only": "Clients tuning alone reach",
    "whole_model": "Tuning the whole model directly reaches",
    "extraction": "An honest-but-curious client that fine-tunes all it holds reaches",
}


def summarise(  # noqa: PLR0913
    reports: Sequence[RoundReport],
    *,
    config_hash: str,
    versions: Mapping[str, str],
    status: str,
    bundle_bytes: int,
    rounds_planned: int | None = None,
    seconds_total: float | None = None,
    peak_rss_mib: float = 0.0,
    baselines: Mapping[str, Any] | None = None,
    emulators: Mapping[str, Mapping[str, Any]] | None = None,
    privacy: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the run in numbers, as `summary.json` holds them; works for any number of reports, none too.

    Args:
        reports: The rounds that finished, oldest first; round 0 is the state before training.
        config_hash: Hash of the resolved config.
        versions: Version by package name.
        status: "finished", "interrupted" or "failed".
        bundle_bytes: Size of a bundle's tensors.
        rounds_planned: How many rounds were asked for; by default those that finished.
        seconds_total: Wall time of the run with its set-up, s; what the rounds don't account for is overhead.
        peak_rss_mib: The driver's own peak, MiB; the largest of it and the reports' is given.
        baselines: What to compare with, on the same held-out text: `local_only` with `mean` and `clients` (by name),
            `whole_model` and `extraction`, each with loss, perplexity and accuracy; any may be missing.
        emulators: What each emulator is and takes, by key, as `simulations.costs.costs_of` gives it.
        privacy: What is known of differential privacy beside epsilon, as `simulations.privacy.privacy_of` gives it.
        settings: The run's, for what is said of its controller.

    Returns:
        Nested dictionaries of plain values. All four `metrics` are always there, with None where a model was not
        evaluated; `privacy_margin`, `transfer_gap` and `extraction_margin` only where they are known, `emulators` only
        where there are several, `privacy` only with differential privacy, `devices` only with a model of them,
        `control` only where it is not fixed.
    """
    rounds = max((report.round for report in reports), default=0)
    metrics = _last_metrics(reports)
    tokens = _total(reports, "train_tokens")
    seconds = _seconds(reports, seconds_total)
    emulators = {key: dict(costs) for key, costs in (emulators or {}).items()}
    summary: dict[str, Any] = {
        "status": status,
        "rounds": rounds,
        "rounds_planned": rounds if rounds_planned is None else rounds_planned,
        "evaluated_round": max((report.round for report in reports if report.evaluations), default=None),
        "metrics": metrics,
        "baselines": dict(baselines or {}),
        "emulator": emulators.get("default", {}),
        "bytes": {
            "down": sum(report.bytes_down for report in reports),
            "up": sum(report.bytes_up for report in reports),
            "bundle": bundle_bytes,
        },
        "seconds": seconds,
        "train_tokens": int(tokens),
        "tokens_per_second": tokens / seconds["train"] if seconds["train"] > 0 else 0.0,
        "peak_rss_mib": _peak(reports, "peak_rss_mib", peak_rss_mib),
        "peak_gpu_mib": _peak(reports, "peak_gpu_mib", 0.0),
        "participants": len({name for report in reports for name in report.clients}),
        "clients_failed": sum(len(report.failures) for report in reports),
        "failures": dict(Counter(failure.kind for report in reports for failure in report.failures)),
        "config_hash": config_hash,
        "versions": dict(versions),
    }
    also: dict[str, Any] = {"emulators": emulators} if len(emulators) > 1 else {}
    if privacy:
        spent = reports[-1].metrics.get("epsilon", math.inf) if rounds else 0.0
        also["privacy"] = {"epsilon": spent if math.isfinite(spent) else None, **privacy}
    also |= control_facts(reports, settings or {})
    return summary | also | simulated(reports) | _differences(reports, summary)


def _last_metrics(reports: Iterable[RoundReport]) -> dict[str, dict[str, float | None]]:
    """Return each model's newest evaluation (that of zero-shot models is their only one)."""
    nothing: dict[str, float | None] = dict.fromkeys(("loss", "perplexity", "accuracy", "tokens"))
    metrics: dict[str, dict[str, float | None]] = {name: dict(nothing) for name in MODELS}
    for report in reports:
        metrics.update({name: dict(result.to_json()) for name, result in report.evaluations.items()})
    return metrics


def _total(reports: Iterable[RoundReport], name: str) -> float:
    values = (metrics.get(name, 0.0) for report in reports for metrics in report.clients.values())
    return sum(value for value in values if math.isfinite(value))


def _peak(reports: Iterable[RoundReport], name: str, at_least: float) -> float:
    values = [at_least]
    for report in reports:
        values.append(report.metrics.get(name, 0.0))
        values.extend(metrics.get(name, 0.0) for metrics in report.clients.values())
    return max(value for value in values if math.isfinite(value))


def _seconds(reports: Iterable[RoundReport], total: float | None) -> dict[str, float]:
    seconds = {part: sum(report.seconds.get(part, 0.0) for report in reports) for part in SECONDS}
    if total is not None:
        seconds["overhead"] += max(total - seconds["total"], 0.0)
        seconds["total"] = max(total, seconds["total"])
    return seconds


def _differences(reports: Sequence[RoundReport], summary: Mapping[str, Any]) -> dict[str, float]:
    """Return privacy margin (of the newest round with both its parts) and the distances to baselines, where known."""
    differences = {}
    for report in reports:
        found = report.evaluations
        if "emulator_tuned" in found and "plug_in" in found:
            losses = {name: result.loss for name, result in found.items()}
            choices = {name: result.choice_accuracy for name, result in found.items()}
            differences.update(margins(losses, choices))
    plug_in = summary["metrics"]["plug_in"]["loss"]
    loss = {name: found.get("loss") for name, found in summary["baselines"].items()}
    if plug_in is not None and loss.get("whole_model") is not None:
        differences["transfer_gap"] = plug_in - loss["whole_model"]
    if plug_in is not None and loss.get("extraction") is not None:
        differences["extraction_margin"] = loss["extraction"] - plug_in
    return differences


def in_words(summary: Mapping[str, Any]) -> str:
    """Say in a few plain sentences what came of a run.

    >>> from fedpeat.core import Evaluation, RoundReport
    >>> found = {name: Evaluation(loss, 0.3, 1000) for name, loss in
    ...          [("full_zero_shot", 3.842), ("emulator_tuned", 3.401), ("plug_in", 3.371)]}
    >>> report = RoundReport(5, {}, (), found, 0, 0, {}, {})
    >>> print(in_words(summarise([report], config_hash="", versions={}, status="finished", bundle_bytes=0)))
    Plug-in perplexity 29.1 is 38 % below the full model's 46.6 before tuning. The emulated model, all that a device \
holds, reaches 30.0 (the plug-in is 3.0 % below).
    """
    perplexity = {name: result["perplexity"] for name, result in summary["metrics"].items()}
    baselines = summary["baselines"]
    perplexity["local_only"] = baselines.get("local_only", {}).get("mean", {}).get("perplexity")
    for name in ("whole_model", "extraction"):
        perplexity[name] = baselines.get(name, {}).get("perplexity")
    plug_in = perplexity["plug_in"]
    if plug_in is None:
        return "The plug-in model was not evaluated in this run."
    if not math.isfinite(plug_in):
        return "The plug-in loss is not finite: training diverged. Lower client.learning_rate."
    trained = summary["rounds"] > 0
    said = [*_sentences(plug_in, perplexity, trained=trained), *_answers(summary, trained=trained), *_privacy(summary)]
    return " ".join(said)


def _sentences(plug_in: float, perplexity: Mapping[str, float | None], *, trained: bool) -> Iterable[str]:
    full, tuned = perplexity["full_zero_shot"], perplexity["emulator_tuned"]
    personal = perplexity.get("personal")
    if not trained:
        yield f"No round was trained: perplexity {number(plug_in)} is that before tuning."
    elif _known(full):
        against = f"{change(plug_in, full)} the full model's {number(full)} before tuning"
        yield f"Plug-in perplexity {number(plug_in)} is {against}."
    else:
        yield f"Plug-in perplexity is {number(plug_in)}."
    if trained and _known(tuned):
        yield (f"The emulated model, all that a device holds, reaches {number(tuned)} ({_beside(plug_in, tuned)}).")
    if trained and _known(personal):
        yield (
            f"Each client's own model, with the tensors it keeps, reaches {number(personal)} on its own text (only a"
            " simulation can score that: nobody else holds both)."
        )
    for name, reaches in BASELINES.items():
        value = perplexity.get(name)
        if _known(value):
            yield f"{reaches} {number(value)}" + (f" ({_beside(plug_in, value)})." if trained else ".")


def _answers(summary: Mapping[str, Any], *, trained: bool) -> Iterable[str]:
    """Say how often models pick the right answer, where the data has choices."""
    right = {name: found.get("choice_accuracy") for name, found in summary["metrics"].items()}
    for name, found in summary["baselines"].items():
        right[name] = found.get("mean", found).get("choice_accuracy")
    if right["plug_in"] is None:
        return
    if not trained:
        yield f"It gets {percent(right['plug_in'])} of the answers right."
        return
    named = {
        "full_zero_shot": "the full model before tuning",
        "emulator_tuned": "the emulated one",
        "local_only": "clients alone",
        "whole_model": "the whole model tuned",
        "extraction": "the curious client",
    }
    others = [f"{label} {percent(right[name])}" for name, label in named.items() if right.get(name) is not None]
    yield f"The plug-in gets {percent(right['plug_in'])} of the answers right" + (
        f" ({', '.join(others)})." if others else "."
    )


def _privacy(summary: Mapping[str, Any]) -> Iterable[str]:
    """Say what the shared tensors may tell of a client, under differential privacy."""
    found = summary.get("privacy")
    if not found:
        return
    if found["epsilon"] is None:
        yield "Deltas were clipped, but no noise was added: nothing is private."
        return
    yield (
        f"What is shared is differentially private for {found['neighbours']}: epsilon {number(found['epsilon'])} at"
        f" delta {found['delta']:g}" + (", if nobody knows the noise's seed." if found["repeatable"] else ".")
    )


def _beside(plug_in: float, value: float) -> str:
    words = change(plug_in, value)
    return "as the plug-in" if words == "equal to" else f"the plug-in is {words}"


def _known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
