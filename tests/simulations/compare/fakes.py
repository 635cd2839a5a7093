"""What worker processes run in tests instead of a simulation."""

import json
import os
import signal
import time
from pathlib import Path

from fedpeat.core import ConfigError, Evaluation, RoundReport, write_json
from fedpeat.server import History
from simulations.report import summarise
from simulations.settings import settings_hash


def run(settings, folder):
    """Do as `tracker` says (a key that anything can be put in), else write a run whose loss follows the rank."""
    wish = settings["tracker"].get("wish", "")
    print("hello from", wish)
    os.system("echo a child speaks")
    if wish == "raise":
        raise ConfigError("asked", "found", "remedy")
    if wish == "bug":
        raise ZeroDivisionError
    if wish == "exit":
        raise SystemExit(3)
    if wish == "die":
        os._exit(7)
    if wish == "killed":
        os.kill(os.getpid(), 9)
    if wish == "slow":
        (folder / "begun").touch()
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            return finish(settings, folder, "interrupted")
    return finish(settings, folder, "finished")


def finish(settings, folder, status):
    rank, seed = settings["peft"]["rank"], settings["seed"]
    history, reports = History(folder), []
    for number in range(settings["rounds"] + 1):
        loss = 4 - number * (0.1 + rank / 100) + seed / 1000
        found = {"plug_in": Evaluation(loss, 1 / (1 + loss), 100), "full_zero_shot": Evaluation(4.0, 0.2, 100)}
        seconds = {"total": 1.0, "train": 0.5, "evaluate": 0.5}
        visit = {"a": {"train_seconds": 0.4, "train_loss": loss, "weight": 1.0}} if number else {}
        moved = 1000 * rank * bool(number)
        reports.append(RoundReport(number, visit, (), found, moved, moved, seconds, {}))
        history.append(reports[-1])
    write_json(folder / "clients.json", [{"name": "a"}, {"name": "b"}])
    facts = {"config_hash": settings_hash(settings), "versions": {}, "status": status, "bundle_bytes": 1}
    summary = summarise(reports, **facts, seconds_total=5.0, peak_rss_mib=float(os.getpid()))
    summary["threads"] = os.environ["OMP_NUM_THREADS"]
    write_json(folder / "summary.json", summary)
    return json.loads(Path(folder / "summary.json").read_text())


def deaf(settings, folder):
    """Hear no interruption."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(600)
