"""Runs to a comparison: each variant's mean over seeds, how it differs from its baseline, and what it cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from simulations.compare.collect import Run
from simulations.compare.grid import label_of
from simulations.compare.request import METRICS
from simulations.compare.statistics import Interval, Point, first_reaching, interval, median_or_never, paired

VERDICTS = ("baseline", "better", "worse", "within noise", "unknown")


@dataclass(frozen=True)
class Placed:
    """A run and its place in a comparison: the values of the keys that vary, and its seed."""

    values: Mapping[str, str]
    seed: int
    run: Run


@dataclass(frozen=True)
class Variant:
    """What came of one combination of values, over its seeds.

    Attributes:
        values: The value of each varying key, as shown.
        label: What it is called.
        placed: Its runs.
        model: The model that it is judged by: `plug_in` or `personal`.
        finals: The metric at the end, by seed, of finished runs; not finite where training diverged.
        result: Mean and interval of `finals`; None where there is none or one diverged.
        difference: Mean and interval of the paired differences to the baseline, None where there are none.
        verdict: One of VERDICTS; better and worse only where the interval excludes 0.
        ranked: Whether it is scored on the same text as its baseline: if not, the numbers do not compare.
        target: The value to reach, or None.
        reached: Where each finished run reached it, None where it did not.
        costs: Means over finished runs, by name, NaN where unknown.
    """

    values: Mapping[str, str]
    label: str
    placed: tuple[Placed, ...]
    model: str
    finals: Mapping[int, float]
    result: Interval | None
    difference: Interval | None = None
    verdict: str = "unknown"
    ranked: bool = True
    target: float | None = None
    reached: tuple[Point | None, ...] = ()
    costs: Mapping[str, float] = field(default_factory=dict)

    @property
    def finished(self) -> list[Run]:
        """Its finished runs."""
        return [placed.run for placed in self.placed if placed.run.status == "finished"]

    @property
    def diverged(self) -> int:
        """How many finished runs ended with a metric that is not finite."""
        return sum(not math.isfinite(value) for value in self.finals.values())

    @property
    def rounds_to_target(self) -> float | None:
        """Median over seeds of the rounds to the target; None where it was not reached."""
        return median_or_never([None if point is None else float(point.round) for point in self.reached])

    @property
    def bytes_to_target(self) -> float | None:
        """Median over seeds of the bytes to the target, both ways; None where it was not reached."""
        return median_or_never([None if point is None else float(point.bytes) for point in self.reached])


@dataclass(frozen=True)
class Comparison:
    """Everything that the outputs tell.

    Attributes:
        title: What it is called.
        metric: The metric compared by.
        keys: The keys that vary.
        baseline: The value of the first key that others are compared with; empty where nothing varies.
        variants: Best first; then those that diverged, then those without a finished run.
        target: As asked for; None where each baseline's own result is its variants' target.
        notes: What a reader must know, in sentences.
    """

    title: str
    metric: str
    keys: tuple[str, ...]
    baseline: str
    variants: tuple[Variant, ...]
    target: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def lower_is_better(self) -> bool:
        """Whether a lower metric is better."""
        return METRICS[self.metric]

    @property
    def metric_words(self) -> str:
        """The metric as a person reads it."""
        return self.metric.replace("_", " ")

    @property
    def baseline_label(self) -> str:
        """What the baseline's value is called."""
        return label_of({self.keys[0]: self.baseline}) if self.keys else ""

    @property
    def failures(self) -> list[tuple[str, list[int], str]]:
        """Failed runs: what their variant is called, the seeds that failed alike, and the reason."""
        found: dict[tuple[str, str], list[int]] = {}
        for variant in self.variants:
            for placed in variant.placed:
                if placed.run.status == "failed":
                    found.setdefault((variant.label, placed.run.reason), []).append(placed.seed)
        return [(label, seeds, reason) for (label, reason), seeds in found.items()]

    @property
    def runs(self) -> list[Placed]:
        """All runs, in the order of the variants."""
        return [placed for variant in self.variants for placed in variant.placed]

    @property
    def seeds(self) -> int:
        """The largest number of finished seeds of a variant."""
        return max((len(variant.finals) for variant in self.variants), default=0)


def compare(
    placed: Sequence[Placed],
    *,
    title: str,
    metric: str = "perplexity",
    baseline: str | None = None,
    target: float | None = None,
    notes: Sequence[str] = (),
) -> Comparison:
    """Return the comparison of runs.

    Args:
        placed: The runs; those of one variant have equal values.
        title: What it is called.
        metric: One of METRICS.
        baseline: Value of the first key that others are compared with; None for that of the first run.
        target: Value of the metric to reach; None for the mean of each variant's baseline.
        notes: Further sentences for the reader.
    """
    keys = tuple(placed[0].values) if placed else ()
    if baseline is None:
        baseline = placed[0].values[keys[0]] if keys else ""
    groups: dict[tuple[str, ...], list[Placed]] = {}
    for one in placed:
        groups.setdefault(tuple(one.values.values()), []).append(one)
    alone = {values: _alone(runs, metric) for values, runs in groups.items()}
    lower = METRICS[metric]
    judged = [
        _judged(variant, alone.get((baseline, *values[1:])) if keys else variant, metric, target, lower=lower)
        for values, variant in alone.items()
    ]
    ordered = tuple(sorted(judged, key=lambda variant: _order(variant, lower=lower)))
    return Comparison(title, metric, keys, baseline, ordered, target, (*notes, *_notes(ordered, keys)))


def _alone(placed: Sequence[Placed], metric: str) -> Variant:
    """Return a variant without what needs a baseline."""
    finals = {}
    for one in placed:
        value = one.run.final(metric) if one.run.status == "finished" else None
        if value is not None:
            finals[one.seed] = value
    good = bool(finals) and all(math.isfinite(value) for value in finals.values())
    finished = [one.run for one in placed if one.run.status == "finished"]
    return Variant(
        values=placed[0].values,
        label=label_of(placed[0].values),
        placed=tuple(placed),
        model=finished[0].model if finished else "plug_in",
        finals=finals,
        result=interval(list(finals.values())) if good else None,
        costs=_costs(finished),
    )


def _judged(variant: Variant, base: Variant | None, metric: str, target: float | None, *, lower: bool) -> Variant:
    """Return a variant with its difference to the baseline, the verdict on it, and where it reached its target."""
    changes: dict[str, Any] = {}
    if base is not None and variant.model != base.model:  # scored on other text: the numbers do not compare
        return replace(variant, ranked=False)
    if target is None and base is not None and base.result is not None:
        target = base.result.mean
    if target is not None:
        curves = [run.curve(metric) for run in variant.finished]
        changes["reached"] = tuple(first_reaching(curve, target, lower_is_better=lower) for curve in curves)
    if variant is base:
        changes["verdict"] = "baseline"
    elif base is not None and variant.result is not None and base.result is not None:
        difference = paired(variant.finals, base.finals)
        changes |= {"difference": difference, "verdict": _verdict(difference, lower=lower)}
    return Variant(**{**vars(variant), "target": target, **changes})


def _verdict(difference: Interval | None, *, lower: bool) -> str:
    if difference is None or difference.excludes_zero is None:
        return "unknown"
    if not difference.excludes_zero:
        return "within noise"
    return "better" if (difference.mean < 0) == lower else "worse"


def _costs(runs: Sequence[Run]) -> dict[str, float]:
    """Return means over runs of what they cost; the largest of memory, since that is what must be there."""
    names = {
        "down": [run.summary["bytes"]["down"] for run in runs],
        "up": [run.summary["bytes"]["up"] for run in runs],
        "bundle": [run.summary["bytes"]["bundle"] for run in runs],
        "seconds": [run.summary["seconds"]["total"] for run in runs],
        "clients_failed": [run.summary["clients_failed"] for run in runs],
        "aggregation_error": [run.aggregation_error for run in runs if run.aggregation_error is not None],
    }
    means = {name: fmean(values) if values else math.nan for name, values in names.items()}
    peaks = ("peak_rss_mib", "peak_gpu_mib")
    return means | {name: max((run.summary[name] or 0.0 for run in runs), default=math.nan) for name in peaks}


def _order(variant: Variant, *, lower: bool) -> tuple[int, float]:
    if variant.result is not None:
        return (0 if variant.ranked else 1), variant.result.mean if lower else -variant.result.mean
    return (2 if variant.finals else 3), 0.0


def _notes(variants: Sequence[Variant], keys: Sequence[str]) -> list[str]:
    notes = []
    most = max((len(variant.finals) for variant in variants), default=0)
    compared = [
        variant for variant in variants if variant.difference is not None and variant.difference.half is not None
    ]
    if most == 1 and keys:
        notes.append("One seed says nothing of the noise between seeds: no difference is called larger than it.")
    elif compared:
        text = f"Means over {most} seeds, ± the half-width of a 95 % t-interval; differences are paired, seed by seed."
        if len(compared) > 1:
            text += f" One in 20 such intervals misses the truth by chance, and {len(compared)} are shown."
        notes.append(text)
    if any(variant.finals for variant in variants):
        notes.append(
            "Costs are means over seeds; memory is the largest process's, which may have run other cells before."
        )
    if any(variant.model == "personal" for variant in variants):
        notes.append(
            "personal: each client's own model, which nobody else has, on that client's own text; shown after the"
            " others, whose text is another, and not compared with them."
        )
    if any(variant.result is None and variant.diverged for variant in variants):
        notes.append("diverged: the loss of at least one run was not finite at its end.")
    return notes
