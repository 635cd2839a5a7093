"""Clients on many worker processes, on this machine or a Ray cluster, through Flower's simulation runtime."""

import logging
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedpeat.core import ConfigError, EngineError

Main = Callable[[Grid, Sequence[int]], Any]

WORKER_ENVIRONMENT = (
    "FLWR_TELEMETRY_ENABLED",
    "FLWR_DISABLE_UPDATE_CHECK",
    "HF_HUB_OFFLINE",
    "HF_HOME",
    "FEDPEAT_DEBUG",
)


@dataclass(frozen=True)
class RayEngine:
    """Clients on `workers` long-lived processes.

    Attributes:
        workers: Worker processes.
        cpus_per_client: CPUs a worker reserves; may be a fraction.
        gpus_per_client: GPUs a worker reserves; may be a fraction (0.25: four workers share one).
        address: An existing Ray cluster ("auto", "ray://host:10001"), or None to start one here.
        memory_mib: Size of Ray's object store here, MiB; None for Ray's own choice.
    """

    workers: int
    cpus_per_client: float
    gpus_per_client: float
    address: str | None
    memory_mib: int | None
    name: str = "ray"

    def run(self, main: Main, *, client_app: ClientApp, slots: int, stop: threading.Event) -> Any:
        """Return `main(grid, nodes)`, called in a thread beside Flower's simulation runtime.

        Raises:
            EngineError: If Ray cannot start or the simulation runtime fails.
        """
        from flwr.simulation import run_simulation

        outcome: dict[str, Any] = {}
        finished = threading.Event()
        server_app = ServerApp()

        @server_app.main()
        def serve(grid: Grid, _context: Context) -> None:
            try:
                outcome["value"] = main(grid, _nodes(grid, slots))
            except BaseException as error:
                outcome["error"] = error
            finally:
                finished.set()

        if os.environ.get("FEDPEAT_DEBUG") != "1":
            logging.getLogger("flwr").setLevel(logging.CRITICAL)  # failures come back as replies and are reported
        self._start_ray()
        try:
            with _ctrl_c_sets(stop), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run_simulation(
                    server_app,
                    client_app,
                    num_supernodes=slots,
                    backend_config={
                        "client_resources": {"num_cpus": self.cpus_per_client, "num_gpus": self.gpus_per_client}
                    },
                )
        except Exception as error:
            stop.set()
            finished.wait(10)
            if "error" not in outcome:
                raise EngineError(
                    "Flower's simulation runtime failed",
                    f"{error} ({error.__cause__ or 'no cause given'})",
                    "see that engine.cpus_per_client and engine.gpus_per_client fit the machine, or use engine=serial",
                ) from error
        if "error" in outcome:
            raise outcome["error"]
        if "value" not in outcome:
            raise EngineError("the federation's round loop did not end", "no result", "run with FEDPEAT_DEBUG=1")
        return outcome["value"]

    def _start_ray(self) -> None:
        import ray

        environment = {name: os.environ[name] for name in WORKER_ENVIRONMENT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(
            [*(path for path in sys.path if path), os.environ.get("PYTHONPATH", "")]
        )
        environment["PYTHONWARNINGS"] = "ignore"
        here: dict[str, Any] = {
            "num_cpus": self.workers * self.cpus_per_client,
            "include_dashboard": False,
            # Free a message at once: Ray would keep a second's worth of them, 300 MB where updates have 10 MB each.
            "_system_config": {"free_objects_period_milliseconds": 0},
        }
        if self.gpus_per_client:
            here["num_gpus"] = self.workers * self.gpus_per_client
        if self.memory_mib:
            here["object_store_memory"] = self.memory_mib * 2**20
        try:
            _reach(self.address)
            ray.init(
                address=self.address or "local",  # None would join whatever cluster RAY_ADDRESS or an old note names
                **({} if self.address else here),
                runtime_env={"env_vars": environment},
                log_to_driver=os.environ.get("FEDPEAT_DEBUG") == "1",
                logging_level=logging.ERROR,
            )
        except (Exception, SystemExit) as error:  # Ray exits where it cannot reach an address
            where = f"at {self.address}" if self.address else f"with {self.workers} workers here"
            raise EngineError(
                f"Ray could not start {where}",
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
                "check engine.address, free memory and /dev/shm, or use engine=serial",
            ) from error


def _reach(address: str | None) -> None:
    """Raise OSError where nothing listens at `host:port`: Ray itself would wait for minutes, then exit."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _nodes(grid: Grid, slots: int) -> list[int]:
    """Return the ids of all nodes; they are registered by another thread, so wait for the last one."""
    while len(nodes := list(grid.get_node_ids())) < slots:
        threading.Event().wait(0.01)
    return sorted(nodes)


@contextmanager
def _ctrl_c_sets(stop: threading.Event) -> Iterator[None]:
    """Turn the first Ctrl-C into a request to stop, so that the round loop can end in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def ray(
    *,
    workers: int | None = None,
    cpus_per_client: float = 1,
    gpus_per_client: float = 0,
    address: str | None = None,
    memory_mib: int | None = None,
) -> RayEngine:
    """Return the engine that runs clients on worker processes.

    Args:
        workers: Worker processes; None for as many as the CPUs allow.
        cpus_per_client: CPUs a worker reserves.
        gpus_per_client: GPUs a worker reserves.
        address: An existing Ray cluster, or None to start one here.
        memory_mib: Size of Ray's object store, MiB.

    Raises:
        ConfigError: If a number is out of range.
    """
    if cpus_per_client <= 0 or gpus_per_client < 0 or (workers is not None and workers < 1):
        raise ConfigError(
            f"engine.workers={workers}, cpus_per_client={cpus_per_client}, gpus_per_client={gpus_per_client}",
            "workers must be at least 1, CPUs above 0, GPUs at least 0",
            "leave engine.workers at null to use all CPUs",
        )
    count = workers or max(1, int((os.cpu_count() or 1) / cpus_per_client))
    return RayEngine(count, cpus_per_client, gpus_per_client, address, memory_mib)
