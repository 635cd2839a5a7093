"""A run's settings from Python are those of the command line; functions of one's own stand in them by name."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from fedpeat.core import ConfigError
from simulations.building import built
from simulations.python import settings_from
from simulations.settings import conf_folder, load_settings
from strategies import Recipe, weighted_mean
from strategies.general import fed_avg, fed_prox

SAME = {
    "nothing": ({}, []),
    "options": (
        {"model": "hf", "model.name": "x", "strategy": "fed_adam"},
        ["model=hf", "model.name=x", "strategy=fed_adam"],
    ),
    "an overlay, and what wins over it": ({"rounds": 7, "experiment": "smoke"}, ["experiment=smoke", "rounds=7"]),
    "nested": ({"client": {"local_steps": 3, "optimizer": "SGD"}}, ["client.local_steps=3", "client.optimizer=SGD"]),
    "nested and dotted": (
        {"model.split.first": 1, "model": {"split": {"last": 3}}},
        ["model.split.first=1", "model.split.last=3"],
    ),
    "open mappings": (
        {"client.optimizer_options": {"weight_decay": 0.1}, "control": {"kept_blocks": {"ann": 2}}},
        ["client.optimizer_options={weight_decay: 0.1}", "control.kept_blocks={ann: 2}"],
    ),
    "lists and paths": (
        {"data": "jsonl", "data.path": [Path("a, b.jsonl"), "c=d.jsonl"], "peft.targets": ("q_proj",)},
        ["data=jsonl", "data.path=['a, b.jsonl', 'c=d.jsonl']", "peft.targets=[q_proj]"],
    ),
    "none and flags": ({"clients.count": None, "export": False}, ["clients.count=null", "export=false"]),
}


@pytest.mark.parametrize("name", SAME)
def test_settings_are_those_of_the_command_line(name):
    given, overrides = SAME[name]
    assert settings_from(given) == load_settings(overrides)


def test_what_was_given_stays_as_it_was():
    given = {"client": {"optimizer_options": {"betas": [0.9, 0.99]}}}
    settings = settings_from(given)
    settings["client"]["optimizer_options"]["betas"].append(1)
    assert given == {"client": {"optimizer_options": {"betas": [0.9, 0.99]}}}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"strategy": "fed_adamm"}, "did you mean 'fed_adam'"),
        ({"client.lerning_rate": 1}, "did you mean 'client.learning_rate'"),
        ({"client": {"lerning_rate": 1}}, "did you mean 'client.learning_rate'"),
        ({"client": 3}, "client holds several keys"),
        ({"strategy": 3}, "strategy holds several keys"),
        ({"model": "hf"}, "model.name must be given"),
        ({"seed": object()}, "cannot set seed"),
        ({"hydra.run.dir": "x"}, "no such key"),
        ({"strategy": fed_prox, "strategy.mu": 1}, "choose from: proximal_mu, weight_by"),
        ({"privacy": fed_prox}, "options alone"),
        ({"peft": fed_prox}, "options alone"),
        ({"strategy": lambda: Recipe("own", weighted_mean())}, "top of a module"),
        ({"strategy": functools.partial(fed_avg, weight_by="rows")}, "top of a module"),
    ],
)
def test_mistakes_are_told(given, words):
    with pytest.raises(ConfigError, match=words):
        settings_from(given)


def of_my_own(*, share: float, weight_by: str = "rows") -> Recipe:
    return Recipe(f"own {share}", weighted_mean(), weight_by=weight_by)


def test_a_function_of_ones_own_stands_in_the_settings_by_name():
    settings = settings_from({"strategy": fed_prox, "strategy.proximal_mu": 0.5, "rounds": 1})
    assert settings["strategy"] == {
        "_target_": "strategies.general.fed_prox",
        "proximal_mu": 0.5,
        "weight_by": "tokens",
    }
    assert built(yaml.safe_load(yaml.safe_dump(settings))["strategy"]).client(1) == {"proximal_mu": 0.5}
    with pytest.raises(ConfigError, match=r"strategy\.share must be given"):
        settings_from({"strategy": of_my_own})


def test_one_of_the_program_itself_is_found_again():
    """As a person would: in a script, whose module is called `__main__`."""
    code = """
from simulations.building import built
from simulations.python import settings_from
from strategies import Recipe, weighted_mean
def own(*, share: float = 0.5) -> Recipe:
    return Recipe(f"own {share}", weighted_mean())
node = settings_from({"strategy": own, "strategy.share": 0.25})["strategy"]
print(node["_target_"], built(node).name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "__main__.own own 0.25\n"


def test_a_program_that_uses_hydra_itself_keeps_its_own():
    from hydra import initialize_config_dir

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        settings_from({"rounds": 1})
        assert GlobalHydra.instance().is_initialized()
    assert not GlobalHydra.instance().is_initialized()


def test_nothing_calls_out_from_python_either():
    code = "import simulations.run; from flwr.supercore import telemetry; print(telemetry.FLWR_TELEMETRY_ENABLED)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "0"
