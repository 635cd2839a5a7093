import pytest

from fedpeat.core import ConfigError
from simulations.settings import conf_folder
from simulations.study.nodes import STAGES, selections

LEAST = ("selection=uniform", "kept=2")


def test_every_option_of_the_group_has_its_place():
    options = {path.stem for path in (conf_folder() / "emulator").glob("*.yaml")}
    assert options == {*selections(), *STAGES, "chain", "distilled", "listed"}


def test_the_axes_have_defaults_where_a_study_needs_no_choice(asked):
    found = asked(*LEAST)
    assert found.axes == {
        "selection": ("uniform",),
        "kept": ("2",),
        "compression": ("none",),
        "distillation": ("0",),
        "unfreeze": ("none",),
    }
    assert (found.reference, found.federated, found.extraction) == (True, True, False)
    assert found.run.seeds == (0, 1, 2)


@pytest.mark.parametrize(
    ("word", "axis", "texts"),
    [
        ("selection=uniform,cka", "selection", ("uniform", "cka")),
        ("selection=glob(*st)", "selection", ("first", "last")),
        ("kept=2,0.5,1.0,.25", "kept", ("2", "0.5", "1.0", "0.25")),
        ("kept=1.0", "kept", ("1.0",)),
        ("kept=range(1,4)", "kept", ("1", "2", "3")),
        ("compression=none,low_rank,int8+low_rank", "compression", ("none", "low_rank", "low_rank+int8")),
        ("compression=ffn_channels+low_rank+int4", "compression", ("ffn_channels+low_rank+int4",)),
        ("compression=null", "compression", ("none",)),
        ("distillation=none,200", "distillation", ("0", "200")),
        ("unfreeze=none,mlp+attention", "unfreeze", ("none", "attention+mlp")),
        ("unfreeze=[attention,mlp],null", "unfreeze", ("attention+mlp", "none")),
    ],
)
def test_values_are_read_as_they_are_written(asked, word, axis, texts):
    others = [each for each in LEAST if not each.startswith(f"{axis}=")]
    assert asked(word, *others).axes[axis] == texts


def test_a_policy_belongs_to_what_trains(asked):
    found = asked(*LEAST, "unfreeze=none,norm", "policy=discard,local").unfreeze
    assert [(each.text, each.parts, each.policy) for each in found] == [
        ("none", (), "map_back"),
        ("norm (discard)", ("norm",), "discard"),
        ("norm (local)", ("norm",), "local"),
    ]
    assert [each.text for each in asked(*LEAST, "unfreeze=norm", "policy=local").unfreeze] == ["norm"]


def test_keywords_of_builders_reach_the_values_that_use_them(asked):
    words = ("compression=none,low_rank,low_rank+int8", "low_rank.share=0.25,0.5", "int8.block_size=32")
    found = asked(*LEAST, *words).compression
    assert [each.text for each in found] == [
        "none",
        *("low_rank (share 0.25)", "low_rank (share 0.5)"),
        *("low_rank+int8 (share 0.25)", "low_rank+int8 (share 0.5)"),
    ]
    assert found[0].settings == {}
    assert found[-1].settings == {"low_rank": {"share": 0.5}, "int8": {"block_size": 32}}


def test_the_rest_is_a_run(asked):
    found = asked(*LEAST, "rounds=2,3", "seeds=[4,7]", "metric=accuracy", "jobs=2", "reference=false")
    assert [item.key_or_group for item in found.run.overrides] == ["rounds"]
    assert (found.run.seeds, found.run.metric, found.run.jobs, found.reference) == ((4, 7), "accuracy", 2, False)
    assert "selection=uniform" in found.run.words


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["selection=unifrom", "kept=2"], "did you mean 'uniform'"),
        (["selection=distilled", "kept=2"], "no such selection"),
        (["selection=uniform"], "kept must be given"),
        (["kept=2"], "selection must be given"),
        ([*LEAST, "compression=low_rnk"], "did you mean 'low_rank'"),
        ([*LEAST, "compression=int8+int4"], "join different stages"),
        ([*LEAST, "compression=int8+int8"], "join different stages"),
        ([*LEAST, "compression=uniform"], "does not compress"),
        ([*LEAST, "compression=low_rank+int8,int8+low_rank"], "given twice"),
        ([*LEAST, "distillation=-1"], "whole numbers"),
        ([*LEAST, "distillation=1.5"], "whole numbers"),
        ([*LEAST, "unfreeze=atention"], "did you mean 'attention'"),
        ([*LEAST, "policy=mapback"], "did you mean 'map_back'"),
        (["selection=uniform", "kept=two"], "a number of blocks, or a share"),
        (["selection=uniform", "kept=1.5"], "a number of blocks, or a share"),
        (["selection=uniform", "kept=0.0"], "above 0"),
        (["selection=uniform", "kept=-1"], "above 0"),
        (["selection=uniform", "kept=2,02"], "given twice"),
        ([*LEAST, "selction=cka"], "did you mean 'selection'"),
        ([*LEAST, "emulator=cka"], "selection="),
        ([*LEAST, "emulator.kept_blocks=2"], "selection="),
        ([*LEAST, "client.unfreeze=[norm]"], "unfreeze=attention,mlp"),
        ([*LEAST, "clients.pool=true"], "federated=false"),
        ([*LEAST, "low_rank.share=0.5"], "no cell uses low_rank; name it in compression="),
        ([*LEAST, "cka.share=false"], "name it in selection="),
        ([*LEAST, "distilled.warmup=2"], "name it in distillation="),
        ([*LEAST, "compression=low_rank", "low_rank.shre=0.5"], "did you mean 'share'"),
        ([*LEAST, "uniform.kept_blocks=3"], "no such key to set"),
        ([*LEAST, "reference=maybe"], "true or false"),
        ([*LEAST, "full_learning_rate=0"], "above 0"),
        ([*LEAST, "baseline=cka"], "no such key or group"),
        ([*LEAST, "kept=3"], "more than once"),
        ([*LEAST, "--dryrun"], "did you mean '--dry-run'"),
        ([*LEAST, "client.unfreez=1", "jobs=x"], "above 0"),
    ],
)
def test_mistakes_are_told(asked, words, told):
    with pytest.raises(ConfigError) as caught:
        asked(*words)
    assert told in str(caught.value)
