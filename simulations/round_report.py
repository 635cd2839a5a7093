"""What happened in a round: its report, and the clock behind its seconds."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedpeat.core import Evaluation, GlobalState, RoundPlan, RoundReport, peak_gpu_mib, peak_rss_mib
from fedpeat.server import SERVER, margins
from strategies.flower import RecipeStrategy

if TYPE_CHECKING:
    from simulations.federation import Federation


@dataclass
class Clock:
    """Seconds by part; what is in no part is overhead."""

    started: float = field(default_factory=time.perf_counter)
    parts: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "evaluate": 0.0, "wire": 0.0})

    def run(self, part: str, work: Callable[[], Any]) -> Any:
        """Return what `work` returns, its time added to a part."""
        begin = time.perf_counter()
        try:
            return work()
        finally:
            self.parts[part] += time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """Return the seconds of each part, of the total, and of what is in no part."""
        total = time.perf_counter() - self.started
        parts = {**self.parts, "train": max(0.0, self.parts["train"] - self.parts["wire"])}
        return {"total": total, **parts, "overhead": max(0.0, total - sum(parts.values()))}


def report_before(federation: "Federation", state: GlobalState) -> RoundReport:
    """Return the report of round 0: `state`, before any training."""
    clock = Clock()
    results = clock.run("evaluate", lambda: federation.evaluate(state))
    return RoundReport(
        round=0,
        clients={},
        failures=(),
        evaluations={**federation.zero_shot, **results},
        bytes_down=0,
        bytes_up=0,
        seconds=clock.read(),
        metrics=margins_of(results),
    )


def report_of(
    plan: RoundPlan,
    strategy: RecipeStrategy,
    evaluations: Mapping[str, Evaluation],
    clock: Clock,
    *,
    also: Mapping[str, float] | None = None,
    devices: Mapping[str, Mapping[str, Any]] | None = None,
) -> RoundReport:
    """Return the report of the round that `strategy` just aggregated, with the metrics that are known `also`.

    `devices` is what became of each, by name.
    """
    done = strategy.aggregation
    participants = done.clients if done else {}
    clients = {
        name: {
            **metrics,
            "bytes_down": float(strategy.bytes_down.get(name, 0)),
            "bytes_up": 0.0 if name == SERVER else metrics["bytes_up"],
        }
        for name, metrics in participants.items()
    }
    seconds = clock.read()
    tokens = sum(metrics.get("train_tokens", 0.0) for metrics in clients.values())
    losses = [metrics["train_loss"] for metrics in clients.values() if "train_loss" in metrics]
    workers = [metrics["peak_rss_mib"] for metrics in clients.values() if "peak_rss_mib" in metrics]
    return RoundReport(
        round=plan.round,
        clients=clients,
        failures=tuple(strategy.failures),
        evaluations=evaluations,
        bytes_down=sum(strategy.bytes_down.values()),
        bytes_up=int(sum(metrics["bytes_up"] for metrics in clients.values())),
        seconds=seconds,
        metrics={
            **({"train_loss": sum(losses) / len(losses)} if losses else {}),
            "update_norm": done.update_norm if done else 0.0,
            "tokens_per_second": tokens / max(seconds["train"], 1e-9),
            "peak_rss_mib": max([peak_rss_mib(), *workers]),
            "peak_gpu_mib": peak_gpu_mib(),
            "global_step": float(plan.start_step),
            "weights_cut": float(len(strategy.cut)),
            "surplus": float(len(strategy.surplus)),
            **({} if done is None or done.error is None else {"aggregation_error": done.error}),
            **({} if done is None else done.metrics),
            **(also or {}),
            **margins_of(evaluations),
        },
        devices=devices or {},
    )


def margins_of(evaluations: Mapping[str, Evaluation]) -> dict[str, float]:
    """Return the privacy margins by loss and by answers, where known."""
    losses = {name: result.loss for name, result in evaluations.items()}
    return margins(losses, {name: result.choice_accuracy for name, result in evaluations.items()})
