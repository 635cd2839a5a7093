"""Who watches a run together: the person at the terminal, the run's log, the tracker."""

from collections.abc import Mapping

from fedpeat.core import ClientFailure, RoundPlan, RoundReport
from simulations.federation import Observer
from simulations.trackers import Tracker


class Together:
    """An observer that tells several, one after the other.

    Args:
        observers: All of them.
        tracker: Told of each round too.
    """

    def __init__(self, *observers: Observer, tracker: Tracker | None = None) -> None:
        self._observers = observers
        self._tracker = tracker

    def resumed(self, done: int) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.resumed(done)

    def bundle_delivered(self, version: str, clients: int, sent: int) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.bundle_delivered(version, clients, sent)

    def round_started(self, plan: RoundPlan) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.round_started(plan)

    def client_done(self, name: str, metrics: Mapping[str, float]) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.client_done(name, metrics)

    def client_failed(self, failure: ClientFailure) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.client_failed(failure)

    def round_finished(self, report: RoundReport) -> None:
        """Tell all, the tracker too."""
        for observer in self._observers:
            observer.round_finished(report)
        if self._tracker is not None:
            self._tracker.log(report)

    def message(self, text: str) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.message(text)

    def working(self, text: str, share: float | None) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.working(text, share)
