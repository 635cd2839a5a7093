import pytest

from fedpeat.core import ConfigError
from simulations.settings import conf_folder, load_settings, settings_hash


def test_the_defaults_compose_into_plain_values():
    settings = load_settings(["rounds=3", "peft.rank=4", "client.optimizer_options={weight_decay: 0.1}"])
    assert settings["rounds"] == 3
    assert settings["peft"]["rank"] == 4
    assert settings["client"]["optimizer_options"] == {"weight_decay": 0.1}
    assert "hydra" not in settings
    assert type(settings["model"]) is dict


PROMISED = (
    *("model.name", "model.split.first", "model.split.last", "emulator.kept_blocks", "peft.rank", "data.text_field"),
    *("data.client_field", "data.partitioner", "clients.count", "clients.per_round", "client.local_steps"),
    *("client.batch_size", "client.learning_rate", "server.train", "rounds", "evaluate_every", "seed"),
)


def test_promised_keys_exist():
    settings = load_settings()
    for key in PROMISED:
        node = settings
        for part in key.split("."):
            assert part in node, key
            node = node[part]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("peft=lorra", "did you mean 'lora'"),
        ("strategy=nope", "choose from"),
        ("client.lerning_rate=1", "did you mean 'client.learning_rate'"),
        ("peft.rnk=1", "did you mean 'peft.rank'"),
        ("round=3", "set one of them: round.max_update_norm"),
        ("rounds", "cannot read an override"),
        ("a=[1", "cannot read an override"),
        ("model=hf", "model.name must be given"),
    ],
)
def test_mistakes_are_told_with_the_nearest_choice(override, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        load_settings([override])


def test_open_mappings_take_any_key():
    assert load_settings()["control"]["kept_blocks"] == {}
    assert load_settings(["control.kept_blocks={sympy: 2}"])["control"]["kept_blocks"] == {"sympy": 2}


def test_the_hash_sees_results_not_execution():
    base = settings_hash(load_settings())
    assert base == settings_hash(load_settings(["engine=ray", "engine.workers=2"]))
    assert base != settings_hash(load_settings(["seed=1"]))


def every_option():
    for group in sorted(path for path in conf_folder().iterdir() if path.is_dir()):
        for option in sorted(group.glob("*.yaml")):  # what is below them are parts of options
            yield group.name, option.stem


NEEDED = {"model=hf": "model.name=x", "strategy=flower": "strategy.name=FedMedian"}


@pytest.mark.parametrize(("group", "option"), [*every_option()])
def test_every_option_composes_and_binds(group, option):
    import inspect

    from hydra.utils import get_method

    choice = f"{group}={option}"
    extra = [NEEDED[choice]] if choice in NEEDED else []
    if group == "data":
        extra += ["data.path=x"] if option in {"text", "jsonl", "csv", "parquet", "hub"} else []
    settings = load_settings([choice, *extra])
    for node in settings.values():
        if isinstance(node, dict) and "_target_" in node:
            keywords = {key: value for key, value in node.items() if key != "_target_"}
            inspect.signature(get_method(node["_target_"])).bind(**keywords)


def test_there_are_options_to_check():
    assert len(list(every_option())) >= 20
