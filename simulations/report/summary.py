"""A run in one dictionary: `summary.json`, and what it says in words."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from fedpeat.core import RoundReport
from simulations.report.wording import change, number

MODELS = ("full_zero_shot", "emulator_zero_shot", "emulator_tuned", "plug_in")
SECONDS = ("total", "train", "evaluate", "wire", "overhead")
STATUSES = ("finished", "interrupted", "failed")


def summarise(
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
            and `whole_model`, each with loss, perplexity and accuracy; either may be missing.

    Returns:
        Nested dictionaries of plain values. All four `metrics` are always there, with None where a model was not
        evaluated; `privacy_margin` and `transfer_gap` only where they are known.
    """
    rounds = max((report.round for report in reports), default=0)
    metrics = _last_metrics(reports)
    tokens = _total(reports, "train_tokens")
    seconds = _seconds(reports, seconds_total)
    summary: dict[str, Any] = {
        "status": status,
        "rounds": rounds,
        "rounds_planned": rounds if rounds_planned is None else rounds_planned,
        "evaluated_round": max((report.round for report in reports if report.evaluations), default=None),
        "metrics": metrics,
        "baselines": dict(baselines or {}),
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
    return summary | _differences(reports, summary)


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
    """Return privacy margin (of the newest round with both its parts) and transfer gap, where known."""
    differences = {}
    for report in reports:
        found = report.evaluations
        if "emulator_tuned" in found and "plug_in" in found:
            differences["privacy_margin"] = found["emulator_tuned"].loss - found["plug_in"].loss
    plug_in, whole = summary["metrics"]["plug_in"]["loss"], summary["baselines"].get("whole_model")
    if plug_in is not None and whole is not None:
        differences["transfer_gap"] = plug_in - whole["loss"]
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
    perplexity["whole_model"] = baselines.get("whole_model", {}).get("perplexity")
    plug_in = perplexity["plug_in"]
    if plug_in is None:
        return "The plug-in model was not evaluated in this run."
    if not math.isfinite(plug_in):
        return "The plug-in loss is not finite: training diverged. Lower client.learning_rate."
    return " ".join(_sentences(plug_in, perplexity, trained=summary["rounds"] > 0))


def _sentences(plug_in: float, perplexity: Mapping[str, float | None], *, trained: bool) -> Iterable[str]:
    full, tuned = perplexity["full_zero_shot"], perplexity["emulator_tuned"]
    personal = perplexity.get("personal")
    local, whole = perplexity["local_only"], perplexity["whole_model"]
    if not trained:
        yield f"No round was trained: perplexity {number(plug_in)} is that before tuning."
    elif _known(full):
        against = f"{change(plug_in, full)} the full model's {number(full)} before tuning"
        yield f"Plug-in perplexity {number(plug_in)} is {against}."
    else:
        yield f"Plug-in perplexity is {number(plug_in)}."
    if trained and _known(tuned):
        yield (
            f"The emulated model, all that a device holds, reaches {number(tuned)} "
            f"(the plug-in is {change(plug_in, tuned)})."
        )
    if trained and _known(personal):
        yield (
            f"Each client's own model, with the tensors it keeps, reaches {number(personal)} on its own text (only a"
            " simulation can score that: nobody else holds both)."
        )
    for name, value in (("Clients tuning alone reach", local), ("Tuning the whole model directly reaches", whole)):
        if _known(value):
            yield f"{name} {number(value)}" + (f" (the plug-in is {change(plug_in, value)})." if trained else ".")


def _known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
