"""The Prometheus endpoint of a deployment's server: the newest run's numbers, read from its folder when asked.

It is part of `fedpeat deploy server`, which stays between runs and outlives a run that crashed. Nothing is kept that is
not in the run's folder.
"""

import contextlib
import ipaddress
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeat.core import ConfigError, EngineError
from simulations.deployment.layout import Deployment
from simulations.deployment.tally import HISTORY, Sums, Tally, delivered_of, number_of, rounds_of, state_of

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

HOST = "127.0.0.1"
PACKAGE = "prometheus-client"
_ADDRESS = re.compile(r"(?:(?:(?P<four>[0-9.]+)|\[(?P<six>[0-9a-fA-F:.]+)\]):)?(?P<port>[0-9]{1,5})")
MEASURES = ("loss", "perplexity", "accuracy", "choice_accuracy")


def address_of(text: str) -> tuple[str, int]:
    """Return where the endpoint is to listen: `9464` on this machine alone, `0.0.0.0:9464` for other machines too.

    Raises:
        ConfigError: If it is neither a port nor `address:port`.

    >>> address_of("9464"), address_of("0.0.0.0:9464"), address_of("[::1]:9464")
    (('127.0.0.1', 9464), ('0.0.0.0', 9464), ('::1', 9464))
    """
    found = _ADDRESS.fullmatch(text)
    host, port = (found["four"] or found["six"] or HOST, int(found["port"])) if found else ("", 0)
    try:
        ipaddress.ip_address(host)
    except ValueError:
        port = 0
    if not 1 <= port <= 65535:
        raise ConfigError(f"metrics={text}", "neither a port nor address:port", "metrics=9464, or metrics=0.0.0.0:9464")
    return host, port


@contextlib.contextmanager
def serving(deployment: Deployment, text: str | None) -> Iterator[str | None]:
    """Serve `/metrics` while in the block, where `text` says; yield the address, or None where nothing was asked for.

    Raises:
        ConfigError: If `text` is no address, the deployment's own port, or the package is not installed.
        EngineError: If nothing can listen there.
    """
    if text is None:
        yield None
        return
    host, port = address_of(text)
    if port == deployment.port:
        raise ConfigError(f"metrics={text}", "the deployment itself is served at that port", "metrics=9464, say")
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        found, remedy = "it is not installed here", 'pip install "fedpeat[metrics]", or leave metrics out'
        raise ConfigError(f"metrics={text} needs the package {PACKAGE}", found, remedy) from error
    registry = CollectorRegistry()
    registry.register(Scrape(deployment))
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        remedy = "choose another port, or end what listens there"
        raise EngineError(f"cannot serve metrics at {text}", error.strerror or str(error), remedy) from error
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Scrape:
    """What a scrape finds: a collector of `prometheus_client`.

    Args:
        deployment: Whose newest run is told of.
    """

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._tally = Tally()
        self._lock = threading.Lock()

    def describe(self) -> "Iterable[Metric]":
        """Return nothing: what there is depends on the run, and is not asked for before a scrape."""
        return []

    def collect(self) -> "Iterator[Metric]":
        """Yield the newest run's metrics; without one, only how many clients are let in."""
        from prometheus_client.core import GaugeMetricFamily

        yield GaugeMetricFamily("fedpeat_clients", "Clients that the server lets in.", value=len(self._let_in()))
        folder = self._deployment.latest_run()
        if folder is None:
            return
        with self._lock:  # scrapes come on threads of their own
            sums = self._tally.read(folder)
            yield from _run(folder)
            yield from _rounds(folder, sums)
            yield from _traffic(folder, sums, self._deployment.names)
            yield from _models(sums)

    def _let_in(self) -> list[str]:
        deployment = self._deployment
        return [name for name in deployment.names if deployment.insecure or deployment.public_key(name).exists()]


def _run(folder: Path) -> "Iterator[Metric]":
    from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

    told = {"run": folder.name, "status": state_of(folder)}
    yield InfoMetricFamily("fedpeat_run", "The newest run and what has become of it.", value=told)
    rounds = rounds_of(folder)
    if rounds is not None:
        yield GaugeMetricFamily("fedpeat_rounds", "Rounds that the run was asked for.", value=rounds)


def _rounds(folder: Path, sums: Sums) -> "Iterator[Metric]":
    from prometheus_client.core import GaugeMetricFamily

    if sums.round is None:
        return
    yield GaugeMetricFamily("fedpeat_round", "The last finished round; 0 before training.", value=sums.round)
    yield GaugeMetricFamily(
        "fedpeat_round_clients", "Clients whose updates counted in the last round.", value=sums.clients
    )
    yield GaugeMetricFamily("fedpeat_round_seconds", "Wall time of the last round.", value=sums.seconds)
    with contextlib.suppress(OSError):
        when = (folder / HISTORY).stat().st_mtime
        yield GaugeMetricFamily("fedpeat_round_timestamp_seconds", "When the last round was finished.", value=when)


def _traffic(folder: Path, sums: Sums, names: Iterable[str]) -> "Iterator[Metric]":
    from prometheus_client.core import CounterMetricFamily

    yield CounterMetricFamily(
        "fedpeat_down_bytes", "Tensor payload sent to clients in the run's rounds.", value=sums.bytes_down
    )
    yield CounterMetricFamily(
        "fedpeat_up_bytes", "Tensor payload received from clients in the run's rounds.", value=sums.bytes_up
    )
    sent = sum(size for _, size in delivered_of(folder))
    yield CounterMetricFamily("fedpeat_bundle_bytes", "Bundles sent to clients before round 1.", value=sent)
    failures = CounterMetricFamily(
        "fedpeat_failures", "Client visits of the run that did not count.", labels=["client"]
    )
    for name in sorted({*names, *sums.failures}):  # those without are told of too: a rate needs a first zero
        failures.add_metric([name], sums.failures[name])
    yield failures


def _models(sums: Sums) -> "Iterator[Metric]":
    from prometheus_client.core import GaugeMetricFamily

    for measure in MEASURES:
        family = GaugeMetricFamily(
            f"fedpeat_{measure}", f"Newest {measure.replace('_', ' ')} on held-out text, by model.", labels=["model"]
        )
        for model, found in sums.evaluations.items():
            if measure in found:
                family.add_metric([model], number_of(found[measure]))
        if family.samples:
            yield family
    if "epsilon" in sums.metrics:
        epsilon = number_of(sums.metrics["epsilon"])
        yield GaugeMetricFamily("fedpeat_epsilon", "Differential privacy spent so far.", value=epsilon)
