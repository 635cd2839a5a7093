"""Runs to a study: what each setup reached and took, over its seeds, and how far it is behind the best."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from simulations.compare.collect import Run
from simulations.compare.request import METRICS
from simulations.compare.statistics import Interval, interval, paired
from simulations.compare.variants import Comparison, Placed, Variant, compare
from simulations.study.axes import AXES
from simulations.study.cells import FULL, SETUP, WHOLE

BySeed = Mapping[int, float]

TEXT_KEYS = ("data", "model", "experiment")
"""Keys of a run that may change what is scored: across them, numbers do not compare."""

MODELS = {
    "plug_in": "plug_in",
    "emulated": "emulator_tuned",
    "full_zero_shot": "full_zero_shot",
    "emulator_zero_shot": "emulator_zero_shot",
}
COSTS = (
    *("emulator_parameters", "middle_parameters", "kept_share", "bundle_bytes", "full_bytes", "client_memory_bytes"),
    *("full_memory_bytes", "step_seconds", "full_step_seconds", "zero_shot_ratio"),
)
MARGINS = ("privacy_margin", "privacy_margin_accuracy", "extraction_margin")
TIMES = ("step_seconds", "full_step_seconds")


def _model(name: str) -> Callable[[Run, str], float | None]:
    return lambda run, metric: value_of_model(run, name, metric)


MEASURES: dict[str, Callable[[Run, str], float | None]] = {
    **{name: _model(model) for name, model in MODELS.items()},
    **{name: lambda run, _, name=name: run.summary.get(name) for name in MARGINS},
    "extraction": lambda run, metric: run.summary.get("baselines", {}).get("extraction", {}).get(metric),
    **{name: lambda run, _, name=name: (run.summary.get("emulator") or {}).get(name) for name in COSTS},
    "seconds": lambda run, _: run.summary.get("seconds", {}).get("total"),
}
"""What is read of a finished run, by name: a function of the run and the metric; None where it is not known."""


@dataclass(frozen=True)
class Setup:
    """One combination, or a reference, over its seeds.

    Attributes:
        values: The value of each key that is shown.
        label: What it is called.
        role: setup, whole or full.
        placed: Its runs.
        measures: Each measure of its finished runs by seed; not finite where training diverged.
        behind: Mean and interval of the paired differences to the best setup on the same text; None for the best.
        verdict: best, worse (than the best, beyond noise), within noise, unknown, reference, or empty.
    """

    values: Mapping[str, str]
    label: str
    role: str
    placed: tuple[Placed, ...]
    measures: Mapping[str, BySeed] = field(default_factory=dict)
    behind: Interval | None = None
    verdict: str = ""

    def interval(self, name: str) -> Interval | None:
        """Return mean and interval of a measure; None where it is not known, or not finite for a seed."""
        values = list(self.measures.get(name, {}).values())
        return interval(values) if values and all(map(math.isfinite, values)) else None

    def mean(self, name: str) -> float | None:
        """Return the mean of a measure."""
        found = self.interval(name)
        return None if found is None else found.mean

    @property
    def result(self) -> Interval | None:
        """The plug-in model's metric at the end."""
        return self.interval("plug_in")

    @property
    def diverged(self) -> int:
        """How many finished runs ended with a metric that is not finite."""
        return sum(not math.isfinite(value) for value in self.measures.get("plug_in", {}).values())

    @property
    def place(self) -> tuple[str, ...]:
        """The values of the keys that may change what is scored: only within one place do numbers compare."""
        return tuple(text for key, text in self.values.items() if _is_of_text(key))

    @property
    def others(self) -> tuple[tuple[str, str], ...]:
        """The keys beside the axes, and their values."""
        return tuple((key, text) for key, text in self.values.items() if key not in AXES)


@dataclass(frozen=True)
class Study:
    """Everything that the outputs tell.

    Attributes:
        comparison: The runs as `simulations.compare` knows them: status, failures, what they share.
        axes: The values of each axis that is shown, in the order given.
        setups: The combinations, the best first, those without a result last.
        references: The whole model, tuned directly.
    """

    comparison: Comparison
    axes: Mapping[str, tuple[str, ...]]
    setups: tuple[Setup, ...]
    references: tuple[Setup, ...]

    @property
    def lower_is_better(self) -> bool:
        """Whether a lower metric is better."""
        return self.comparison.lower_is_better

    @property
    def metric_words(self) -> str:
        """The metric as a person reads it."""
        return self.comparison.metric_words

    @property
    def swept(self) -> list[str]:
        """The axes with more than one value."""
        return [name for name, values in self.axes.items() if len(values) > 1]

    @property
    def parts(self) -> list["Study"]:
        """The study once for each text that is scored: only within one do numbers compare."""
        places = list(dict.fromkeys(setup.place for setup in (*self.setups, *self.references)))
        return [
            replace(
                self,
                setups=tuple(setup for setup in self.setups if setup.place == place),
                references=tuple(setup for setup in self.references if setup.place == place),
            )
            for place in places
        ]

    @property
    def seeds(self) -> int:
        """The largest number of finished seeds of a setup."""
        return max((len(setup.measures.get("plug_in", {})) for setup in self.setups), default=0)


def value_of_model(run: Run, model: str, metric: str) -> float | None:
    """Return a model's metric at the end; NaN where training diverged, None where it was not evaluated."""
    if run.summary.get("evaluated_round") is None:
        return None
    found = run.summary["metrics"].get(model, {})
    if metric not in found:
        return None
    return math.nan if found[metric] is None else float(found[metric])


def study_of(
    placed: Sequence[Placed],
    roles: Sequence[str],
    labels: Sequence[str],
    *,
    title: str,
    metric: str,
    axes: Mapping[str, Sequence[str]],
) -> Study:
    """Return what runs show.

    Args:
        placed: The runs.
        roles: Their cells' roles.
        labels: What their cells are called.
        title: What the study is called.
        metric: One of METRICS.
        axes: The values of each axis that is shown.
    """
    groups: dict[tuple[str, ...], list[tuple[Placed, str, str]]] = {}
    for one in zip(placed, roles, labels, strict=True):
        groups.setdefault(tuple(one[0].values.values()), []).append(one)
    every = _with_gaps([_setup([one[0] for one in alike], *alike[0][1:], metric) for alike in groups.values()])
    lower = METRICS[metric]
    setups = _judged([each for each in every if each.role == SETUP], lower=lower)
    references = [replace(each, verdict="reference") for each in every if each.role != SETUP]
    ordered = tuple(sorted(setups, key=lambda setup: _order(setup, lower=lower)))
    told = compare(placed, title=title, metric=metric)
    by_values = {tuple(variant.values.items()): variant for variant in told.variants}
    variants = tuple(_variant(by_values, setup) for setup in (*ordered, *references))
    comparison = replace(told, variants=variants, notes=())
    shown = {name: tuple(values) for name, values in axes.items()}
    return Study(comparison, shown, ordered, tuple(references))


def _setup(placed: Sequence[Placed], role: str, label: str, metric: str) -> Setup:
    measures: dict[str, dict[int, float]] = {}
    for one in placed:
        for name, measure in MEASURES.items() if one.run.status == "finished" else ():
            value = measure(one.run, metric)
            if value is not None:
                measures.setdefault(name, {})[one.seed] = float(value)
        loss = value_of_model(one.run, "plug_in", "loss") if one.run.status == "finished" else None
        if loss is not None:
            measures.setdefault("loss", {})[one.seed] = loss
    return Setup(placed[0].values, label, role, tuple(placed), measures)


def _variant(by_values: Mapping[Any, Variant], setup: Setup) -> Variant:
    return replace(by_values[tuple(setup.values.items())], label=setup.label)


def _with_gaps(every: Sequence[Setup]) -> list[Setup]:
    """Return setups with `transfer_gap`: plug-in loss minus that of the whole model's PEFT, of the same seed."""
    whole = {setup.others: setup.measures.get("loss", {}) for setup in every if setup.role == WHOLE}
    made = []
    for setup in every:
        base, own = whole.get(setup.others, {}), setup.measures.get("loss", {})
        gaps = {seed: own[seed] - base[seed] for seed in own if seed in base} if setup.role in {SETUP, FULL} else {}
        made.append(replace(setup, measures={**setup.measures, "transfer_gap": gaps} if gaps else setup.measures))
    return made


def _judged(setups: Sequence[Setup], *, lower: bool) -> list[Setup]:
    """Return setups, each with its difference to the best one that is scored on the same text."""
    best: dict[tuple[str, ...], Setup] = {}
    for setup in setups:
        other = best.get(setup.place)
        if setup.result and (other is None or _order(setup, lower=lower) < _order(other, lower=lower)):
            best[setup.place] = setup
    return [_beside(setup, best.get(setup.place)) for setup in setups]


def _beside(setup: Setup, best: Setup | None) -> Setup:
    if setup.result is None or best is None:
        return setup
    if setup is best:
        return replace(setup, verdict="best")
    behind = paired(setup.measures["plug_in"], best.measures["plug_in"])
    known = None if behind is None else behind.excludes_zero
    return replace(setup, behind=behind, verdict={None: "unknown", True: "worse", False: "within noise"}[known])


def _order(setup: Setup, *, lower: bool) -> tuple[int, float]:
    if setup.result is not None:
        return 0, setup.result.mean if lower else -setup.result.mean
    return (1 if setup.diverged else 2), 0.0


def _is_of_text(key: str) -> bool:
    return key.split(".", maxsplit=1)[0] in TEXT_KEYS
