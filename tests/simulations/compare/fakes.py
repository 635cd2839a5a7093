"""What worker processes run in tests instead of a simulation: no import of ours, so that they start at once."""

import json
import math
import os
import signal
import time


def run(settings, folder):
    """Do as the tracker's `wish` says (any key may stand there), else write a run whose loss follows the rank."""
    wish = settings["tracker"].get("wish", "")
    print("hello from", wish)
    os.system("echo a child speaks")
    if wish == "bug":
        raise ZeroDivisionError
    if wish == "exit":
        raise SystemExit(3)
    if wish == "die":
        os._exit(7)
    if wish == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if wish == "slow":
        try:  # from before it is seen to have begun: an interruption may follow at once
            (folder / "begun").touch()
            time.sleep(600)
        except KeyboardInterrupt:
            return finish(settings, folder, "interrupted")
    return finish(settings, folder, "finished")


def raises_ours(settings, folder):
    """Fail as our own code does."""
    from fedpeat.core import ConfigError

    raise ConfigError("asked", "found", "remedy")


def deaf(settings, folder):
    """Hear no interruption."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(600)


def finish(settings, folder, status):
    """Write what a run writes: two clients, each round as dear as the rank."""
    rank, seed, rounds = settings["peft"].get("rank", 2), settings["seed"], settings["rounds"]
    visit = {"train_seconds": 0.4, "train_loss": 3.0, "weight": 1.0}
    for number in range(rounds + 1):
        loss = 4 - number * (0.1 + rank / 100) + seed / 1000
        result = {"loss": loss, "perplexity": math.exp(loss), "accuracy": 1 / (1 + loss), "tokens": 100}
        moved = 1000 * rank * bool(number)
        report = {
            "round": number,
            "clients": {"a": visit} if number else {},
            "failures": [],
            "evaluations": {"plug_in": result},
            "bytes_down": moved,
            "bytes_up": moved,
            "seconds": {"total": 1.0, "train": 0.5, "evaluate": 0.25},
            "metrics": {},
        }
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(report) + "\n")
    summary = {
        "status": status,
        "rounds": rounds,
        "evaluated_round": rounds,
        "metrics": {"plug_in": result},
        "bytes": {"down": 1000 * rank * rounds, "up": 1000 * rank * rounds, "bundle": 1},
        "seconds": {"total": 5.0, "train": 1.0, "evaluate": 1.0},
        "peak_rss_mib": 500.0,
        "peak_gpu_mib": 0.0,
        "clients_failed": 0,
        "versions": {},
        "config_hash": (folder / "config.sha").read_text().strip(),
        "process": os.getpid(),
        "threads": os.environ["OMP_NUM_THREADS"],
    }
    (folder / "clients.json").write_text(json.dumps([{"name": "a"}, {"name": "b"}]))
    (folder / "summary.json").write_text(json.dumps(summary))
    return summary


def finish_anyhow(settings, folder):
    """Heed no wish."""
    return finish(settings, folder, "finished")
