"""A real federation, of real processes on this machine, computes what a simulation of it does.

One server and three clients stay up for all tests here; each has a folder of its own, as if it were a machine.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from tests.processes import PATIENCE, end, free_port, wait_for

pytestmark = pytest.mark.slow

RUNNING = []  # the server, then a client for each of NAMES
AFTER_ONE = "checkpoint/round-000001.safetensors"
NAMES = ("ann", "bob", "eve")
CHOSEN = ("peft.dropout=0.1", "client.optimizer_state=keep", "control.local_steps={eve: 4}", "codec=top_k")
COMMAND = "import sys; from simulations.cli import main; main(['deploy', *sys.argv[1:]])"


def environment(folder):
    """The environment of a person whose home is empty: `folder` is any machine's."""
    return {**os.environ, "HOME": str(folder.parent / "home"), "FLWR_HOME": ""}


def start(*words, log, cwd):
    """Start `fedpeat deploy`; what it says goes into `log`."""
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *map(str, words)],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=environment(cwd),
        )


def command(*words, cwd):
    """Run `fedpeat deploy`; return its exit code and what it said."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=cwd,
        env=environment(cwd),
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def restart(name, machines):
    """Start a client again until the server lets it in, as systemd does: it first has to notice that it was gone."""
    log, deadline, place = machines / name / "again.log", time.monotonic() + PATIENCE, 1 + NAMES.index(name)
    while time.monotonic() < deadline:
        RUNNING[place] = start("client", machines / name / "site", log=log, cwd=log.parent)
        wait_for(lambda: RUNNING[place].poll() is not None or "ready" in log.read_text(), what=log.read_text)
        if RUNNING[place].poll() is None:
            return
    pytest.fail(log.read_text())


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """A folder for each machine."""
    folder = tmp_path_factory.mktemp("machines")
    for name in ("server", *NAMES, "home"):
        (folder / name).mkdir()
    return folder


@pytest.fixture(scope="module")
def deployment(machines, tiny, held_out):
    """What `init` writes, on the server; the clients' folders are on their machines."""
    without = ("data.path", "data.server_path", "data.client_field", "cache")
    words = [word for word in tiny(*CHOSEN) if word.partition("=")[0] not in without]
    words += [f"data.path={held_out}", f"names=[{','.join(NAMES)}]", "hosts=[127.0.0.1]", f"port={free_port()}"]
    folder = machines / "server" / "federation"
    code, said = command("init", folder, *words, cwd=machines / "server")
    assert code == 0, said
    for name in NAMES:
        shutil.move(folder / "clients" / name, machines / name / "site")
    return folder


@pytest.fixture(scope="module")
def up(machines, deployment, only):
    """The server and its clients, until the tests are over."""
    running = RUNNING

    def stay(*words, log):
        running.append(start(*words, log=log, cwd=log.parent))
        return running[-1]

    try:
        log = machines / "server" / "out.log"
        server = stay("server", deployment, "bind=127.0.0.1", log=log)
        wait_for(lambda: "ready" in log.read_text(), what=log.read_text, process=server)
        logs = {name: machines / name / "out.log" for name in NAMES}
        for name, log in logs.items():
            stay("client", machines / name / "site", f"data.path={only(name)}", log=log)
        for log in logs.values():
            wait_for(lambda log=log: "ready" in log.read_text(), what=log.read_text)
        yield deployment
    finally:
        while running:
            end(running.pop())


def latest(deployment):
    return sorted((deployment / "runs").iterdir())[-1]


@pytest.fixture(scope="module")
def ran(up, open_run):
    """A whole run: `(exit code, what was said, the run)`."""
    code, said = command("run", up, cwd=up.parent)
    assert code == 0, said
    return said, open_run(latest(up))


def test_machines_compute_what_one_process_does(ran, run):
    _, real = ran
    simulated = run(*CHOSEN)
    assert real.summary["status"] == "finished"
    assert real.digest == simulated.digest
    assert real.losses == simulated.losses
    for one, other in zip(real.rounds, simulated.rounds, strict=True):
        assert (one["bytes_down"], one["bytes_up"]) == (other["bytes_down"], other["bytes_up"])


def test_a_client_computes_all_rounds_in_one_process(ran):
    _, real = ran
    for name in NAMES:
        assert real.of(name, "process", 1) == real.of(name, "process", 2)


def test_progress_is_seen_as_it_happens(ran):
    said, _ = ran
    assert "3 clients are there" in said
    assert "round 2/2" in said
    assert "INFO" not in said


def test_each_client_gets_the_bundle_once(ran, read_json, machines):
    _, real = ran
    delivered = read_json(real.folder / "delivery.json")
    assert sorted(delivered) == sorted(NAMES)
    for name, known in delivered.items():
        kept = machines / name / "site" / "bundles" / known["bundle"]
        files = read_json(kept / "manifest.json")["files"]
        assert (known["had"], known["parts"]) == (False, 1)
        assert known["bytes_down"] == sum(entry["bytes"] for entry in files.values())


def test_flower_leaves_the_users_home_alone(ran, machines):
    assert not (machines / "home" / ".flwr").exists()
    for name in NAMES:
        assert (machines / name / "site" / "flower").is_dir()


@contextlib.contextmanager
def changed(deployment, **groups):
    """Other settings for a while."""
    before = (deployment / "config.yaml").read_text()
    settings = yaml.safe_load(before)
    for key, value in groups.items():
        settings[key] = {**settings[key], **value} if isinstance(value, dict) else value
    (deployment / "config.yaml").write_text(yaml.safe_dump(settings))
    try:
        yield
    finally:
        (deployment / "config.yaml").write_text(before)


def test_a_run_that_fails_says_so_and_bundles_are_not_sent_again(ran, deployment, read_json):
    _, before = ran
    with changed(deployment, round={"max_update_norm": 1e-12}):
        code, said = command("run", deployment, cwd=deployment.parent)
    assert code == 1, said
    assert "round.max_update_norm=1e-12" in said
    assert latest(deployment) != before.folder
    for known in read_json(latest(deployment) / "delivery.json").values():
        assert (known["had"], known["parts"], known["bytes_down"]) == (True, 0, 0)


def test_a_run_that_is_stopped_ends_in_order(ran, deployment, read_json):
    log, before = deployment.parent / "stopped.log", latest(deployment)
    with changed(deployment, rounds=9):  # more than a busy machine does until the command comes to it
        process = start("run", deployment, log=log, cwd=deployment.parent)
        try:
            wait_for(
                lambda: latest(deployment) != before and "round 0" in log.read_text(),
                what=log.read_text,
                process=process,
            )
            code, said = command("stop", deployment, cwd=deployment.parent)
            assert code == 0, said
            assert process.wait(PATIENCE) == 130
        finally:
            end(process)
    assert read_json(latest(deployment) / "summary.json")["status"] == "interrupted"
    code, said = command("status", deployment, cwd=deployment.parent)
    assert code == 0, said
    assert "interrupted" in said
    assert all(name in said for name in NAMES)


def test_a_server_and_a_client_that_were_killed_go_on(ran, deployment, open_run, machines):
    """The server's app is killed after round 1, and a client with all that it started; both come back."""
    _, before = ran
    log, earlier = deployment.parent / "killed.log", latest(deployment)
    process = start("run", deployment, log=log, cwd=deployment.parent)
    try:
        wait_for(
            lambda: latest(deployment) != earlier and (latest(deployment) / AFTER_ONE).exists(),
            what=log.read_text,
            process=process,
        )
        server, ann = RUNNING[:2]
        for one in psutil.Process(server.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any("flwr-serverapp" in word for word in one.cmdline()):
                    one.kill()
        end(ann)
        assert process.wait(PATIENCE) == 1
    finally:
        end(process)
    killed = latest(deployment)
    restart("ann", machines)
    code, said = command("run", deployment, "resume=latest", cwd=deployment.parent)
    assert code == 0, said
    found = open_run(killed)
    assert found.digest == before.digest
    assert found.losses == before.losses
    assert found.summary["resumed_after_rounds"] == [1]
    code, said = command("run", deployment, "resume=lates", cwd=deployment.parent)
    assert code == 2
    assert "latest" in said


def test_a_key_that_is_not_registered_is_refused(up, machines):
    from simulations.deployment.certificates import make_client_keys

    folder = machines / "mallory"
    shutil.copytree(
        machines / "ann" / "site", folder, ignore=shutil.ignore_patterns("flower", "worker", "*.log", "bundles")
    )
    (folder / "key").write_bytes(make_client_keys("ann").private)
    code, said = command("client", folder, cwd=folder)
    assert code == 1, said
    assert "activate" in said
