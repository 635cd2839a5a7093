"""What worker processes run in tests of fits instead of a simulation: no import of ours, so that they start at once."""

import json
import math
import random

CLIENTS = {"ann": 100, "bob": 300, "eve": 200, "ian": 400}
PACE, LEAST, START, APART = 0.5, 2.7, 3.0, 0.01


def run(settings, folder):
    """Write a run whose loss follows response curves: pace, steps (square root), rank, emulator, who takes part."""
    draw = random.Random(f"{settings['seed']} {settings['clients']['per_round']}")
    menu, kept = settings["control"]["menu"], {"default": settings["emulator"]["kept_blocks"] / 8}
    kept |= {f"kept_{blocks}": blocks / 8 for blocks in menu["kept_blocks"] if blocks / 8 != kept["default"]}
    loss, lines = START, []
    for number in range(settings["rounds"] + 1):
        devices = {}
        if number:
            loss, devices = after(loss, draw, settings, kept)
        plug_in = {"loss": loss, "accuracy": 0.3, "tokens": 100, "perplexity": math.exp(loss)}
        rest = {"failures": [], "bytes_down": 0, "bytes_up": 0, "seconds": {}, "clients": {}}
        metrics = {"simulated_seconds": 2.0 * number}
        lines.append(
            {"round": number, "evaluations": {"plug_in": plug_in}, "devices": devices, "metrics": metrics, **rest}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "clients.json").write_text(json.dumps([{"client": name, "rows": rows} for name, rows in CLIENTS.items()]))
    sizes = {key: {"kept_share": share} for key, share in kept.items()}
    summary = {"status": "finished", "config_hash": (folder / "config.sha").read_text().strip()}
    summary |= {"emulator": sizes["default"]} | ({"emulators": sizes} if len(sizes) > 1 else {})
    (folder / "summary.json").write_text(json.dumps(summary))
    return {"status": "finished"}


def after(loss, draw, settings, kept):
    """The loss after a round and who did what in it; one device more is asked, and fails."""
    menu, asked = settings["control"]["menu"], min(settings["clients"]["per_round"], len(CLIENTS))
    names = draw.sample(sorted(CLIENTS), asked)
    devices = {
        name: {
            "status": "counted",
            "emulator": draw.choice(sorted(kept)),
            "rank": draw.choice(menu["ranks"]),
            "local_steps": draw.choice(menu["steps"]),
        }
        for name in names
    }
    share = {name: CLIENTS[name] / sum(CLIENTS.values()) for name in names}
    covered = sum(share.values())
    work = {name: (one["local_steps"] / 2) ** 0.5 * (one["rank"] / 8) ** 0.3 for name, one in devices.items()}
    mean = sum(share[name] * work[name] for name in names) / covered
    left = 1 - sum(share[name] * kept[one["emulator"]] for name, one in devices.items()) / covered
    floor = LEAST + 0.1 * left + APART * math.log(1 / covered)
    loss += (1 - math.exp(-PACE * mean)) * (floor - loss)
    for name in CLIENTS:
        devices.setdefault(name, {"status": "unavailable"})
    return loss, devices


def broken(settings, folder):
    """Fail where few are asked."""
    if settings["clients"]["per_round"] == 1:
        raise ZeroDivisionError
    return run(settings, folder)
