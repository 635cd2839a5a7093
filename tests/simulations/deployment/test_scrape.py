"""What a scrape of a deployment's server tells is what the newest run's folder holds."""

import json
import math
import os
import socket
import subprocess
import sys
import urllib.request
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedpeat.core import ClientFailure, ConfigError, EngineError, Evaluation, RoundReport
from fedpeat.server import History
from simulations.deployment.command import deploy
from simulations.deployment.layout import read_deployment
from simulations.deployment.scrape import address_of, serving
from simulations.deployment.tally import Sums, Tally, state_of
from tests.processes import free_port


@pytest.fixture
def deployment(tmp_path):
    plain = {"names": ["ann", "bob", "eve"], "hosts": ["example.org"], "port": 8000, "insecure": False}
    (tmp_path / "deployment.json").write_text(json.dumps(plain))
    made = read_deployment(tmp_path)
    made.public_key("ann").parent.mkdir()
    for name in ("ann", "bob"):
        made.public_key(name).write_text("a key")
    return made


def report(number, clients=(), failures=(), loss=2.0, metrics=None):
    traffic = {name: {"bytes_down": 1024.0, "bytes_up": 2048.0} for name in clients}
    tuned = {"plug_in": Evaluation(loss, 0.5, 10, 0.75), "emulator_tuned/bob": Evaluation(3.0, 0.25, 10)}
    return RoundReport(
        round=number,
        clients=traffic,
        failures=tuple(ClientFailure(name, number, "error", "no space") for name in failures),
        evaluations={} if loss is None else tuned,
        bytes_down=1024 * len(clients),
        bytes_up=2048 * len(clients),
        seconds={"total": 8.25 + number},
        metrics=metrics or {},
    )


HISTORY = (
    report(0),
    report(1, ["ann", "bob", "server"], loss=1.5),
    report(2, ["ann"], ["bob"], loss=None),
    report(3, ["ann"], ["bob", 'm"al\n'], loss=None, metrics={"epsilon": 4.5}),
)


@pytest.fixture
def place(deployment):
    """The folder of a run of four rounds, the last of which is being done."""
    folder = deployment.runs / "2026-01-01-00-00-00"
    history = History(folder)
    for one in HISTORY:
        history.append(one)
    (folder / "config.yaml").write_text("rounds: 4\n")
    (folder / "delivery.json").write_text(json.dumps({"ann": {"bytes_down": 3000}, "bob": {"bytes_down": 0}}))
    (folder / "run.json").write_text("{}")
    return folder


def scraped(url):
    """Each sample of a scrape, by its name and the values of its labels."""
    with urllib.request.urlopen(url, timeout=30) as reply:
        assert reply.status == 200
        families = list(text_string_to_metric_families(reply.read().decode()))
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


@pytest.fixture
def scrape(deployment):
    """A scrape on a real socket, of one endpoint that stays: `scrape()`."""
    with serving(deployment, str(free_port())) as url:
        yield lambda: scraped(url)


def test_a_scrape_tells_what_the_folder_holds(scrape, place):
    found = scrape()
    when = found.pop(("fedpeat_round_timestamp_seconds",))
    assert when == pytest.approx((place / "metrics.jsonl").stat().st_mtime)
    assert found == {
        ("fedpeat_clients",): 2,
        ("fedpeat_run_info", place.name, "running"): 1,
        ("fedpeat_rounds",): 4,
        ("fedpeat_round",): 3,
        ("fedpeat_round_clients",): 1,
        ("fedpeat_round_seconds",): 11.25,
        ("fedpeat_down_bytes_total",): 5 * 1024,
        ("fedpeat_up_bytes_total",): 5 * 2048,
        ("fedpeat_bundle_bytes_total",): 3000,
        ("fedpeat_failures_total", "ann"): 0,
        ("fedpeat_failures_total", "bob"): 2,
        ("fedpeat_failures_total", "eve"): 0,
        ("fedpeat_failures_total", 'm"al\n'): 1,
        ("fedpeat_loss", "plug_in"): 1.5,
        ("fedpeat_loss", "emulator_tuned/bob"): 3,
        ("fedpeat_perplexity", "plug_in"): pytest.approx(math.exp(1.5)),
        ("fedpeat_perplexity", "emulator_tuned/bob"): pytest.approx(math.exp(3)),
        ("fedpeat_accuracy", "plug_in"): 0.5,
        ("fedpeat_accuracy", "emulator_tuned/bob"): 0.25,
        ("fedpeat_choice_accuracy", "plug_in"): 0.75,
        ("fedpeat_epsilon",): 4.5,
    }


def test_before_the_first_run_and_before_its_first_round(scrape, deployment):
    assert scrape() == {("fedpeat_clients",): 2}
    (deployment.runs / "2026-01-01-00-00-00").mkdir(parents=True)
    found = scrape()
    assert found["fedpeat_run_info", "2026-01-01-00-00-00", "not started"] == 1
    assert found["fedpeat_down_bytes_total",] == 0
    assert ("fedpeat_round",) not in found


def test_a_loss_that_is_not_a_number_is_none(scrape, place):
    History(place).append(report(4, loss=math.nan))
    assert math.isnan(scrape()["fedpeat_loss", "plug_in"])


def test_the_next_scrape_goes_on_and_a_new_run_begins_anew(scrape, place, deployment):
    assert scrape()["fedpeat_round",] == 3
    History(place).append(report(4, ["ann", "bob"]))
    found = scrape()
    assert (found["fedpeat_round",], found["fedpeat_down_bytes_total",]) == (4, 7 * 1024)
    History(deployment.runs / "2026-01-02-00-00-00").append(report(0))
    found = scrape()
    assert (found["fedpeat_round",], found["fedpeat_down_bytes_total",]) == (0, 0)


def test_a_server_without_tls_lets_all_in(deployment):
    with serving(replace(deployment, insecure=True), str(free_port())) as url:
        assert scraped(url)["fedpeat_clients",] == 3


@pytest.mark.parametrize("cut", [1, 20])
def test_half_a_line_is_read_when_it_is_whole(place, cut):
    tally = Tally()
    path = place / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert tally.read(place).round == 2
    assert tally.read(place).failures == {"bob": 1}
    path.write_bytes(whole)
    assert tally.read(place).round == 3
    assert tally.read(place).failures == {"bob": 2, 'm"al\n': 1}


def test_each_line_is_read_once(place, monkeypatch):
    added, add = [], Sums.add
    monkeypatch.setattr(Sums, "add", lambda sums, line: added.append(line["round"]) or add(sums, line))
    tally = Tally()
    tally.read(place)
    tally.read(place)
    History(place).append(report(4))
    tally.read(place)
    assert added == [0, 1, 2, 3, 4]


def test_rounds_that_are_done_again_count_once(place):
    """A resumed run cuts its history; when next looked at it may be as long as before, or longer."""
    tally = Tally()
    tally.read(place)
    for again in ([], [report(2, ["ann", "bob"])], [report(number, ["ann", "bob"]) for number in range(2, 9)]):
        history = History(place)
        history.rewind(1)
        for one in again:
            history.append(one)
        found = tally.read(place)
        assert found.bytes_down == 3 * 1024 + sum(one.bytes_down for one in again)
        assert found.failures == {}
        assert found.round == 1 + len(again)


def test_a_damaged_line_is_passed_over(place):
    path = place / "metrics.jsonl"
    first, second, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, second[:40] + b"\n", b"[]\n", b'{"round": 7}\n', *rest]))
    found = Tally().read(place)
    assert (found.round, found.bytes_down) == (3, 2 * 1024)


def test_what_has_become_of_a_run(place):
    """One that is resumed has the summary of its first end, older than its second start."""
    summary = place / "summary.json"
    assert state_of(place) == "running"
    summary.write_text('{"status": "interrupted"}')
    os.utime(summary, ns=(2_000, 2_000))
    os.utime(place / "run.json", ns=(1_000, 1_000))
    assert state_of(place) == "interrupted"
    os.utime(place / "run.json", ns=(3_000, 3_000))
    assert state_of(place) == "running"


@pytest.mark.parametrize("text", ["", "x", "0", "65536", "-1", "1.5", "²", ":9464", "localhost:1", "[:9464", "1.2.3:4"])
def test_what_is_no_address_is_refused(text, deployment):
    with pytest.raises(ConfigError, match="metrics="):
        address_of(text)
    with pytest.raises(ConfigError, match="neither a port nor address:port"), serving(deployment, text):
        pass


def test_the_command_refuses_it_before_anything_starts(deployment, monkeypatch):
    from simulations.deployment import processes

    monkeypatch.setattr(processes, "is_up", lambda _: False)
    monkeypatch.setattr(processes, "superlink", lambda *_, **__: pytest.fail("started"))
    for words, message in (("metrics=x", "neither"), ("metrics=8000", "itself"), ("metric=9464", "did you mean")):
        with pytest.raises(ConfigError, match=message):
            deploy(["server", str(deployment.folder), words])


def test_a_port_that_is_taken_is_told(deployment):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(EngineError, match=f"cannot serve metrics at {port}"), serving(deployment, str(port)):
            pass


def test_the_port_is_free_again_afterwards(deployment):
    port = str(free_port())
    for _ in range(2):
        with serving(deployment, port) as url:
            assert scraped(url)
    with pytest.raises(OSError, match="refused"):
        scraped(url)


def test_without_the_package_it_is_named(deployment, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"fedpeat\[metrics\]"), serving(deployment, "9464"):
        pass
    with serving(deployment, None) as nothing:
        assert nothing is None


def test_a_process_that_stays_loads_nothing_heavy_for_it():
    heavy = {"torch", "flwr", "transformers", "ray", "hydra", "fedpeat.server"}
    code = f"""
import sys
import simulations.deployment.layout
before = set(sys.modules)
import simulations.deployment.scrape
print(sorted({heavy} & (set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
