import pytest

from fedpeat.core import ConfigError
from simulations.compare.grid import known_names, make_grid
from simulations.compare.request import Request, read_request
from simulations.settings import load_settings, settings_hash


@pytest.fixture(scope="module")
def known():
    return known_names()


def grid_of(known, *words):
    return make_grid(read_request(words, known=known))


def test_every_combination_times_every_seed(known):
    grid = grid_of(known, "peft.rank=4,8", "rounds=2,3,5", "seeds=2", "clients.count=3")
    assert grid.swept == {"peft.rank": ("4", "8"), "rounds": ("2", "3", "5")}
    found = [(cell.settings["peft"]["rank"], cell.settings["rounds"], cell.settings["seed"]) for cell in grid.cells]
    assert found == [(rank, rounds, seed) for rank in (4, 8) for rounds in (2, 3, 5) for seed in (0, 1)]
    assert {cell.settings["clients"]["count"] for cell in grid.cells} == {3}
    assert len({cell.name for cell in grid.cells}) == len({cell.hash for cell in grid.cells}) == 12


def test_a_cell_has_the_settings_of_a_run(known):
    (cell,) = grid_of(known, "peft.rank=4", "seeds=[7]").cells
    expected = load_settings(["peft.rank=4", "seed=7", "export=false"])
    assert cell.hash == settings_hash(expected)
    assert cell.settings == {**expected, "report": False}


@pytest.mark.parametrize(
    ("word", "key", "shown", "values"),
    [
        ("peft.targets=[q_proj,v_proj],[q_proj],null", "peft.targets", ("[q_proj, v_proj]", "[q_proj]", "null"), None),
        ("peft=lora,full", "peft", ("lora", "full"), None),
        ("peft.rank=range(2,5)", "peft.rank", ("2", "3", "4"), [2, 3, 4]),
        ("peft.rank=choice(2,5)", "peft.rank", ("2", "5"), [2, 5]),
        ("experiment=glob(smo*)", "experiment", ("smoke",), None),
        ("client.clip_norm=1.0,null", "client.clip_norm", ("1", "null"), [1.0, None]),
        ("cache='a, b',c", "cache", ("a, b", "c"), ["a, b", "c"]),
        ("client.optimizer_options={betas: [0.5, 0.9]},{}", "client.optimizer_options", None, None),
    ],
)
def test_hydras_grammar_says_what_is_swept(known, word, key, shown, values):
    grid = grid_of(known, word, "seeds=1")
    if shown is not None:
        assert grid.swept == {key: shown}
        assert [cell.values[key] for cell in grid.cells] == list(shown)
    if values is not None:
        node = [cell.settings for cell in grid.cells]
        for part in key.split("."):
            node = [each[part] for each in node]
        assert node == values


def test_lists_and_mappings_reach_the_settings(known):
    grid = grid_of(
        known, "peft.targets=[q_proj,v_proj],null", "client.optimizer_options={weight_decay: 0.5}", "seeds=1"
    )
    assert [cell.settings["peft"]["targets"] for cell in grid.cells] == [["q_proj", "v_proj"], None]
    assert grid.cells[0].settings["client"]["optimizer_options"] == {"weight_decay": 0.5}


def test_one_list_is_one_value(known):
    grid = grid_of(known, "peft.targets=[q_proj,v_proj]", "seeds=1")
    assert grid.swept == {}
    assert grid.baseline == ""
    assert len(grid.cells) == 1


@pytest.mark.parametrize(
    ("words", "seeds"),
    [
        ([], (0, 1, 2)),
        (["seeds=1"], (0,)),
        (["seeds=[4,7]"], (4, 7)),
        (["seeds=4,7"], (4, 7)),
        (["seeds=range(2,4)"], (2, 3)),
        (["seed=5"], (5,)),
        (["seed=5,6"], (5, 6)),
        (["seeds=[4,4]"], (4,)),
    ],
)
def test_seeds_are_a_number_or_a_list(known, words, seeds):
    assert read_request(words, known=known).seeds == seeds


def test_own_keys_do_not_reach_the_run(known):
    words = ["baseline=8", "target=25.5", "jobs=3", "folder=a b/c=d", "metric=loss", "--dry-run", "peft.rank=4,8"]
    request = read_request(words, known=known)
    assert (request.baseline, request.target, request.jobs, request.metric) == ("8", 25.5, 3, "loss")
    assert str(request.folder) == "a b/c=d"
    assert request.dry_run
    assert make_grid(request).baseline == "8"


def test_the_baseline_is_the_first_value_unless_named(known):
    assert grid_of(known, "peft.targets=[q_proj],null", "seeds=1").baseline == "[q_proj]"
    assert grid_of(known, "peft.targets=[q_proj],null", "seeds=1", "baseline=null").baseline == "null"


def test_cells_run_in_their_own_process_unless_an_engine_is_asked_for(known):
    engines = [
        grid_of(known, *words, "seeds=1").cells[0].settings["engine"]["_target_"].rsplit(".", 1)[-1]
        for words in (["experiment=demo"], ["experiment=demo", "engine=ray"], ["engine=ray", "engine.workers=2"])
    ]
    assert engines == ["serial", "ray", "ray"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["strateg=a,b"], "did you mean 'strategy'"),
        (["strategy=fed_avg,fed_agv"], "did you mean 'fed_avg'"),
        (["client.lerning_rate=1,2"], "did you mean 'client.learning_rate'"),
        (["peft.rank=2,8", "peft.rnk=3"], "did you mean 'peft.rank'"),
        (["job=2"], "did you mean 'jobs'"),
        (["sedes=2"], "did you mean 'seeds'"),
        (["peft.rank=2,8", "baseline=3"], "choose from: 2, 8"),
        (["baseline=3"], "no key has several values"),
        (["peft.rank=2,2"], "given twice"),
        (["peft.rank=2", "peft.rank=3"], "more than once"),
        (["jobs=2", "jobs=3"], "more than once"),
        (["seeds=0"], "whole numbers"),
        (["seeds=[]"], "whole numbers"),
        (["seeds=[1,x]"], "whole numbers"),
        (["seeds=-1"], "whole numbers"),
        (["seeds=true"], "whole numbers"),
        (["seed=1", "seeds=2"], "both given"),
        (["jobs=0"], "above 0"),
        (["jobs=two"], "above 0"),
        (["target=nan"], "above 0"),
        (["metric=los"], "did you mean 'loss'"),
        (["client.learning_rate=interval(0,1)"], "no end of values"),
        (["strategy=glob(x*)"], "matches nothing"),
        (["hydra.run.dir=x"], "folder=FOLDER"),
        (["--dryrun"], "did you mean '--dry-run'"),
        (["peft.rank"], "cannot read"),
        (["peft.targets=[a"], "cannot read"),
        (["model=hf,tiny_docs"], "model.name must be given"),
    ],
)
def test_mistakes_are_told_before_anything_runs(known, words, told):
    with pytest.raises(ConfigError) as caught:
        make_grid(read_request(words, known=known))
    assert told in str(caught.value)


def test_folder_names_are_short_and_safe(known):
    long = "[" + ",".join(f"part_{at}" for at in range(60)) + "]"
    for cell in grid_of(known, f"peft.targets={long},['a/../b c','<x>']", "seeds=1").cells:
        assert len(cell.name) < 120
        assert set(cell.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
        assert not cell.name.startswith(".")


def test_an_empty_request_is_one_variant():
    assert Request().overrides == ()
