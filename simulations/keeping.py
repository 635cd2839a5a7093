"""What a run leaves on the disk as it goes, and how it goes on from there after it was killed."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from fedpeat.core import ConfigError, RoundReport, RunState, StorageError, nearest, read_json, write_json
from fedpeat.server import Checkpoints, History, read_history
from simulations.settings import NOT_PART_OF_THE_RESULT, load_settings

CHANGEABLE = (*NOT_PART_OF_THE_RESULT, "rounds")
"""What may be set anew for a run that is resumed."""

MADE_OF = "made_of.json"


class Keeper:
    """History and checkpoints of a run, in its folder.

    A round's report is written before its checkpoint: a kill between them loses neither, since the report of a round
    without checkpoint is dropped and the round done again.

    Args:
        folder: The run's; None keeps nothing.
        checkpoints: How many of the newest stay.
    """

    def __init__(self, folder: Path | None, checkpoints: int) -> None:
        self._folder = folder
        self._checkpoints = Checkpoints(folder / "checkpoint", checkpoints) if folder else None
        self._history = History(folder) if folder else None

    def resume(self, tell: Callable[[str], None]) -> tuple[list[RoundReport], RunState] | None:
        """Return the reports and the state to go on from; None if nothing was kept yet.

        Raises:
            StorageError: If what is there cannot be read.
        """
        if self._folder is None or self._checkpoints is None or self._history is None:
            return None
        state = self._checkpoints.newest(tell)
        self._history.rewind(-1 if state is None else state.round)
        if state is None:
            return None
        reports = read_history(self._folder)
        if not reports or reports[-1].round != state.round:
            last = reports[-1].round if reports else "none"
            raise StorageError(
                f"cannot resume in {self._folder}",
                f"the last checkpoint is of round {state.round}, the last report of round {last}",
                "restore metrics.jsonl",
            )
        state = replace(state, resumed=(*state.resumed, state.round))
        again = self._checkpoints.last_round() - state.round
        if again:  # known from now on, whatever happens next
            state = replace(state, repeated=state.repeated + again)
            self._checkpoints.write(state)
            self._checkpoints.rewind(state.round)
        return reports, state

    def keep(self, report: RoundReport, state: RunState) -> None:
        """Write a round's report, then its state.

        Raises:
            StorageError: If the disk is full.
        """
        if self._history is not None and self._checkpoints is not None:
            self._history.append(report)
            self._checkpoints.write(state)


def settings_to_resume(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Return the settings of the run in `folder`, with what may be set anew.

    Args:
        folder: The run's.
        overrides: As on the command line; of `CHANGEABLE` groups and keys only.

    Raises:
        ConfigError: If there is no run, or something else is to be changed.
    """
    remedy = "name the folder of a run: resume=FOLDER"
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot resume {folder}", str(error), remedy) from error
    if not isinstance(settings, dict):
        raise ConfigError(f"cannot resume {folder}", "its config.yaml holds no settings", remedy)
    roots = {override.partition("=")[0].partition(".")[0]: override for override in overrides}
    for root, override in roots.items():
        if root not in CHANGEABLE:
            raise ConfigError(
                f"cannot change {override} of a run that is resumed",
                f"what can be set anew: {', '.join(CHANGEABLE)}",
                nearest(root, CHANGEABLE) or "start a new run",
            )
    private = settings.get("privacy") or {}
    if "rounds" in roots and private.get("kind") and private.get("epsilon") is not None:
        raise ConfigError(
            f"cannot change {roots['rounds']} of a run with privacy.epsilon={private['epsilon']}",
            "its noise was chosen for the rounds that it began with",
            "resume it without, or start a new run",
        )
    if overrides:
        fresh = load_settings(overrides)
        settings |= {root: fresh[root] for root in roots}
    return settings


def check_made_of(folder: Path, parts: Mapping[str, Any]) -> None:
    """Note what a run is made of; if it was noted before, check that it is the same.

    Args:
        folder: The run's.
        parts: Hashes of data, bundles and frozen PEFT tensors.

    Raises:
        StorageError: If a run that is resumed would go on with something else.
    """
    path = folder / MADE_OF
    if path.exists():
        before = read_json(path)
        changed = sorted(name for name in {*before, *parts} if before.get(name) != parts.get(name))
        if changed:
            raise StorageError(
                f"cannot resume in {folder}",
                f"not what the run began with: {', '.join(changed)}",
                "restore the model's and data's files, or start a new run",
            )
    write_json(path, dict(parts))
