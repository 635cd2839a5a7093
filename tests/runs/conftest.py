"""Whole simulated runs, as a person would start them: settings in, a folder out.

`run(*overrides)` is a run in this process, of a miniature model on a few lines of text; `command(*arguments)` is the
command line in this process. Nothing here looks at how a run is put together: only at settings, folder and exit code.
"""

import json
import os
import random
import sys
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest

TOPICS = {
    "ann": "river boat water fish net",
    "bob": "rock hill climb rope peak",
    "eve": "code bug test loop type",
    "ian": "soup bread salt oven pan",
    "zoe": "song drum note choir bass",
}


@dataclass(frozen=True)
class Ran:
    """A run that ended."""

    folder: Path
    summary: Mapping[str, Any]

    @property
    def rounds(self):
        """A dictionary for each line of the history."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def tensors(self):
        """The travelling tensors by canonical name, whatever the checkpoint puts before it."""
        from safetensors.torch import load_file

        stored = load_file(max((self.folder / "checkpoint").iterdir()))
        names = [name.rpartition("/")[2] for name in stored]
        assert len(names) == len(set(names)), "the checkpoint holds more than the travelling tensors"
        return dict(zip(names, stored.values(), strict=True))

    @property
    def digest(self):
        """A hash of the travelling tensors."""
        from fedpeat.core import digest

        return digest(self.tensors)

    @property
    def state(self):
        """A hash of all that the server keeps: what a recipe remembers too, but not how often the run was resumed."""
        from fedpeat.core import digest
        from fedpeat.server import read_checkpoint

        state = read_checkpoint(max((self.folder / "checkpoint").iterdir()))
        parts = (state.shared.tensors, state.shared.folds, state.shared.memory, state.emulator)
        return (*map(digest, parts), state.round, dict(state.control_state), state.global_step, state.seed)

    @property
    def losses(self):
        return {name: metrics["loss"] for name, metrics in self.summary["metrics"].items()}

    def of(self, client, metric, number=1):
        """A client's metric in a round."""
        return self.rounds[number]["clients"][client][metric]


@pytest.fixture(scope="session")
def read_json():
    return lambda path: json.loads(path.read_text())


@pytest.fixture(scope="session")
def open_run(read_json):
    """A run made before: `open_run(folder)`."""
    return lambda folder: Ran(folder, read_json(folder / "summary.json"))


@pytest.fixture(autouse=True)
def _one_thread():
    """Miniatures have nothing to share out, and threads that wait for each other on a busy machine take seconds."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_folder(miniature, tmp_path_factory):
    """Folders with miniature models: `model_folder(kind="llama", blocks=6, **config)`."""
    from fedpeat.models import save_model

    made = {}

    def make(kind="llama", blocks=6, **config):
        key = (kind, blocks, *sorted(config.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[key] = save_model(miniature(kind, blocks=blocks, **config), folder)
        return made[key]

    return make


@pytest.fixture(scope="session")
def write_notes(tmp_path_factory):
    """Text by author, as JSON lines: `write_notes(authors, documents=12)` gives a file."""

    def write(authors, documents=12, seed=0):
        path = tmp_path_factory.mktemp("notes") / "notes.jsonl"
        draw = random.Random(seed)
        texts = [
            (author, " ".join(draw.choices(TOPICS[author].split(), k=20)))
            for _ in range(documents)
            for author in authors
        ]
        path.write_text("".join(json.dumps({"author": author, "text": text}) + "\n" for author, text in texts))
        return path

    return write


@pytest.fixture(scope="session")
def notes(write_notes):
    """What three authors wrote."""
    return write_notes(("ann", "bob", "eve"))


@pytest.fixture(scope="session")
def held_out(write_notes):
    """What nobody trains on."""
    return write_notes(("ann", "bob", "eve"), documents=1, seed=1)


@pytest.fixture(scope="session")
def only(notes, tmp_path_factory):
    """What one of them wrote: `only("ann")` gives a file."""

    folder = tmp_path_factory.mktemp("only")

    def write(author):
        path = folder / f"{author}.jsonl"
        lines = notes.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["author"] == author))
        return path

    return write


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny(model_folder, notes, held_out, cache):
    """The overrides of a tiny run, and more of them; of two for the same key the last counts.

    Blocks 0 and 5 of 6 are the adapter; of the middle, 1 and 4 stay.
    """

    def overrides(*more, without=()):
        given = [
            "model=hf",
            f"model.name={model_folder()}",
            "model.split.first=1",
            "model.split.last=1",
            "emulator.kept_blocks=2",
            "data=jsonl",
            f"data.path={notes}",
            f"data.server_path={held_out}",
            "data.client_field=author",
            "data.test_share=0.0",
            "data.block_size=16",
            "rounds=2",
            "client.local_steps=2",
            "client.batch_size=2",
            "client.device=cpu",
            "export=false",
            "report=false",
            "evaluation.costs=false",
            f"cache={cache}",
        ]
        named = {override.partition("=")[0]: override for override in [*given, *more]}
        named = {key: override for key, override in named.items() if key not in without}
        # An experiment sets keys too: what is given here must come after it.
        return sorted(named.values(), key=lambda override: not override.startswith("experiment="))

    return overrides


@pytest.fixture(scope="session")
def settings_of():
    """What `load_settings` returns, composed once for each choice of options: it takes longer than a run."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from simulations.settings import conf_folder, load_settings

    groups = {path.name for path in conf_folder().iterdir() if path.is_dir()}
    composed = {}

    def settings(overrides):
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        chosen = tuple(item.input_line for item in parsed if item.key_or_group in groups)
        if chosen not in composed:
            needed = ["strategy.name=not yet"] if "strategy=flower" in chosen else []
            composed[chosen] = load_settings([*chosen, "model.name=not yet", *needed])
        made = deepcopy(composed[chosen])
        for item in parsed:
            if item.key_or_group not in groups:
                *above, last = item.key_or_group.split(".")
                node = reduce(getitem, above, made)
                assert last in node, item.input_line
                node[last] = item.value()
        return made

    return settings


@pytest.fixture(scope="session")
def _runs():
    return {}


@pytest.fixture
def run(tiny, settings_of, tmp_path_factory, _runs):
    """A tiny run in this process, without report and export: `run(*overrides)`.

    A run that another test has made is not made again, unless it is asked for `anew`, or in a folder of its own.
    """
    from simulations.run import simulate

    def launch(*overrides, without=(), folder=None, anew=False):
        given = tuple(tiny(*overrides, without=without))
        if given in _runs and not (anew or folder):
            return _runs[given]
        place = folder or tmp_path_factory.mktemp("run")
        ran = Ran(place, simulate(settings_of(given), place))
        return ran if anew or folder else _runs.setdefault(given, ran)

    return launch


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """The command line in this process, in a folder of its own: `command(*arguments)` gives `(code, out, err)`."""
    from simulations import cli

    def call(*arguments):
        environment = dict(os.environ)
        monkeypatch.chdir(tmp_path)
        # It reads what is known of every package installed, which takes longer than to refuse a run.
        monkeypatch.setattr(cli, "check_owners", lambda: None, raising=False)
        monkeypatch.setattr(sys, "argv", list(sys.argv))
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                cli.main(["simulate", *arguments])
        finally:
            os.environ.clear()
            os.environ.update(environment)
        shown = capsys.readouterr()
        return ended.value.code, shown.out, shown.err

    return call
