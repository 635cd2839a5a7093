"""The ways between machines: a network namespace for each where that is allowed, and links that tests can cut."""

import contextlib
import functools
import os
import shutil
import socket
import subprocess
import threading

DELAY_MS = 20
"""Of what goes to each machine, where the kernel has netem."""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@functools.cache
def namespaces_allowed() -> bool:
    """Whether network namespaces can be made here: Linux, iproute2, root."""
    if shutil.which("ip") is None or os.environ.get("FEDPEAT_TEST_LOOPBACK") == "1":
        return False
    name = f"fp{os.getpid()}probe"
    try:
        _ip("netns", "add", name)
        _ip("netns", "del", name)
        _ip("link", "add", name[:13], "type", "bridge")
        _ip("link", "del", name[:13])
    except (subprocess.CalledProcessError, OSError):
        return False
    return True


class Network:
    """Machines with addresses of their own on one bridge; or all of them this one, by its loopback device.

    Args:
        names: Of the clients' machines.
        apart: Whether to make namespaces.
    """

    def __init__(self, names: tuple[str, ...], *, apart: bool) -> None:
        self.apart = apart
        self.delayed = False
        self._prefix = f"fp{os.getpid()}"
        self._subnet = f"10.77.{os.getpid() % 256}"  # other tests may have a network of their own
        self._numbers = {name: number for number, name in enumerate(("server", *names), start=1)}
        self.host = self.address("server")
        self.outside = f"{self._subnet}.254" if apart else "127.0.0.1"
        """Where this process listens for machines."""

    def __enter__(self) -> "Network":
        if self.apart:
            try:
                self._make()
            except BaseException:
                self._remove()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.apart:
            self._remove()

    def inside(self, name: str) -> list[str]:
        """Return the words before a command that runs on a machine."""
        return ["ip", "netns", "exec", f"{self._prefix}-{name}"] if self.apart else []

    def address(self, name: str) -> str:
        """Return a machine's address."""
        return f"{self._subnet}.{self._numbers[name]}" if self.apart else "127.0.0.1"

    def plug(self, name: str, *, up: bool) -> None:
        """Pull a machine's network cable, or plug it in again."""
        _ip("link", "set", self._cable(name), "up" if up else "down")

    def _cable(self, name: str) -> str:
        return f"{self._prefix}v{self._numbers[name]}"

    @property
    def _bridge(self) -> str:
        return f"{self._prefix}b"

    def _make(self) -> None:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self.outside}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for name in self._numbers:
            space, cable = f"{self._prefix}-{name}", self._cable(name)
            _ip("netns", "add", space)
            _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", cable, "master", self._bridge, "up")
            _ip("-n", space, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")
            delay = ["tc", "qdisc", "add", "dev", cable, "root", "netem", "delay", f"{DELAY_MS}ms"]
            with contextlib.suppress(OSError):
                self.delayed = subprocess.run(delay, capture_output=True, check=False).returncode == 0

    def _remove(self) -> None:
        for name in self._numbers:
            for words in (["link", "del", self._cable(name)], ["netns", "del", f"{self._prefix}-{name}"]):
                with contextlib.suppress(subprocess.CalledProcessError):
                    _ip(*words)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "del", self._bridge)


class Link:
    """A TCP link in front of one client that can be cut: its connections end, and new ones come to nothing.

    So does a proxy, a tunnel or a balancer whose other side is gone.

    Args:
        host: Where it listens, at `port`.
        target: Host and port that it leads to.
    """

    def __init__(self, host: str, target: tuple[str, int]) -> None:
        self._listener, self._target = socket.create_server((host, 0)), target
        self.port = int(self._listener.getsockname()[1])
        self.is_cut, self._ended = False, False
        self._limit: tuple[str, int] | None = None
        self._open: list[socket.socket] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def cut_within(self, direction: str, size: int) -> None:
        """Cut the link in the middle of the next thing in a direction (`up`, `down`) that has this many bytes."""
        self._limit = (direction, size)

    def cut(self) -> None:
        """Cut the link now."""
        # Taken at once: what is let through after `mend` is not to be among them.
        self.is_cut, self._limit, ended, self._open = True, None, self._open, []
        for one in ended:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)  # what waits for it wakes up
            one.close()

    def mend(self) -> None:
        """Let connections through again."""
        self.is_cut = False

    def close(self) -> None:
        """End it."""
        self._ended = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while not self._ended:
            with contextlib.suppress(OSError):
                near, _ = self._listener.accept()
                if self.is_cut:
                    near.close()
                    continue
                self._open.append(near)
                far = socket.create_connection(self._target, timeout=10)
                far.settimeout(None)
                self._open.append(far)
                run = {"up": 0, "down": 0}
                for direction, source, sink in (("up", near, far), ("down", far, near)):
                    threading.Thread(target=self._pump, args=(direction, source, sink, run), daemon=True).start()

    def _pump(self, direction: str, source: socket.socket, sink: socket.socket, run: dict[str, int]) -> None:
        other = "down" if direction == "up" else "up"
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                run[direction], run[other] = run[direction] + len(data), 0
                if self._limit and self._limit[0] == direction and run[direction] >= self._limit[1]:
                    self.cut()
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
