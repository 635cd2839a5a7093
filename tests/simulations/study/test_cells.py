import itertools

import pytest

from fedpeat.core import ConfigError, ModelError
from fedpeat.emulators import BuildContext, Builder, make_emulator
from fedpeat.models import make_split
from simulations.building import built
from simulations.settings import load_settings, settings_hash
from simulations.study.cells import make_cells, title_of
from simulations.study.depth import kept_of
from simulations.study.nodes import STAGES, Choice, emulator_of, selections, why_not

PLAIN = Choice("none"), Choice("0")
STEPS = Choice("2", ("distilled",), {"distilled": {"batch_size": 2, "warmup": 0}})


def compressed(name):
    parts = tuple(name.split("+")) if name else ()
    return Choice(name, parts, {part: {"rows": 4} for part in parts if part in {"harmonizers"}})


def of_cells(cells, *path):
    found = []
    for cell in cells.grid.cells:
        node = cell.settings
        for part in path:
            node = node[part]
        found.append(node)
    return found


def test_cells_are_every_combination_with_every_seed_and_the_references(asked):
    cells = make_cells(asked("selection=uniform,cka", "kept=2,0.5", "seeds=2", "rounds=2"))
    titles = [cell.title for cell in cells.grid.cells]
    setups = [f"{selection}, kept {kept}" for selection in ("uniform", "cka") for kept in ("2", "0.5")]
    whole = ["whole model, LoRA", "whole model, full"]
    assert titles == [title for title in setups for _ in range(2)] + whole + whole
    assert [cell.seed for cell in cells.grid.cells] == [0, 1] * 4 + [0, 0, 1, 1]
    assert len({cell.hash for cell in cells.grid.cells}) == len({cell.name for cell in cells.grid.cells}) == 12
    assert [cells.roles[cell.name] for cell in cells.grid.cells] == ["setup"] * 8 + ["whole", "full"] * 2
    assert of_cells(cells, "emulator", "kept_blocks")[:8] == [2, 2, 4, 4] * 2  # of tiny_docs' 8
    assert cells.axes == {"selection": ("uniform", "cka"), "kept": ("2", "0.5")}


def test_a_cell_is_the_run_that_its_overrides_would_give(asked):
    cells = make_cells(asked("selection=cka", "kept=3", "seeds=1", "unfreeze=none", "reference=false", "rounds=2"))
    (cell,) = cells.grid.cells
    alone = load_settings(["emulator=cka", "emulator.kept_blocks=3", "rounds=2"])
    assert cell.hash == settings_hash(alone)


def test_a_chain_is_the_one_in_the_config(asked):
    words = ("compression=low_rank+int8", "cka.share=true", "low_rank.share=0.25", "distillation=7")
    cells = make_cells(asked("selection=cka", "kept=3", "seeds=1", "reference=false", *words))
    (cell,) = cells.grid.cells
    node = cell.settings["emulator"]
    assert list(node["stages"]) == ["select", "train", "shrink", "store"]
    distilled = load_settings(["emulator=distilled"])["emulator"]["stages"]["train"]
    assert node["stages"]["train"] == {**distilled, "steps": 7}
    own = load_settings(["emulator=low_rank", "emulator.share=0.25"])["emulator"]
    assert node["stages"]["shrink"] == own
    assert cell.title == "cka, kept 3"
    assert cells.notes == ("All setups: compression low_rank+int8, distillation 7.",)


def test_references_tune_every_block(asked):
    cells = make_cells(asked("selection=uniform", "kept=2", "seeds=1", "client.learning_rate=0.01", "rounds=3"))
    _, lora, full = cells.grid.cells
    expected = load_settings(["experiment=fed_peft", "client.learning_rate=0.01", "rounds=3"])
    assert lora.settings["model"]["split"]["blocks"] == "all"
    assert {key: lora.settings[key] for key in ("peft", "client", "emulator")} == {
        key: expected[key] for key in ("peft", "client", "emulator")
    }
    assert full.settings["peft"] == load_settings(["peft=full"])["peft"]
    fed_ft = load_settings(["experiment=fed_ft"])["client"]["learning_rate"]
    assert full.settings["client"] == {**lora.settings["client"], "learning_rate": fed_ft}
    faster = make_cells(asked("selection=uniform", "kept=2", "seeds=1", "full_learning_rate=0.002")).grid.cells[-1]
    assert faster.settings["client"]["learning_rate"] == 0.002
    tuned_whole = make_cells(asked("selection=uniform", "kept=2", "seeds=1", "peft=full"))
    assert [cell.title for cell in tuned_whole.grid.cells] == ["uniform, kept 2", "whole model, full"]


def test_switches_reach_the_cells(asked):
    words = ("selection=uniform", "kept=2", "seeds=1")
    pooled = make_cells(asked(*words, "federated=false", "extraction=true"))
    assert of_cells(pooled, "clients", "pool") == [True] * 3
    assert of_cells(pooled, "baselines", "extraction") == [True, False, False]
    assert len(make_cells(asked(*words, "reference=false")).grid.cells) == 1


def test_other_sweeps_multiply_references_too(asked):
    cells = make_cells(asked("selection=uniform", "kept=2", "seeds=1", "peft.rank=4,8"))
    found = [(cell.title, cell.settings["peft"].get("rank")) for cell in cells.grid.cells]
    assert found[:2] == [("uniform, kept 2, rank 4", 4), ("uniform, kept 2, rank 8", 8)]
    assert {title for title, _ in found[2:]} == {
        f"whole model, {peft}, rank {rank}" for peft in ("LoRA", "full") for rank in (4, 8)
    }


def test_what_cannot_be_is_left_out_and_told(asked):
    words = ("selection=uniform,cka", "kept=2", "compression=none,int8", "unfreeze=none,attention", "seeds=1")
    cells = make_cells(asked(*words, "reference=false"))
    titles = [cell.title for cell in cells.grid.cells]
    assert titles == [
        *("uniform, kept 2", "uniform, kept 2, attention", "uniform, kept 2, int8"),
        *("cka, kept 2", "cka, kept 2, int8"),
    ]
    assert any("2 combinations are left out: attention cannot train as int8" in note for note in cells.notes)
    assert any("1 combination is left out: a block that stands at several places" in note for note in cells.notes)
    with pytest.raises(ConfigError, match="no combination is possible"):
        make_cells(asked("selection=uniform", "kept=2", "compression=int8", "unfreeze=mlp"))


def test_only_distillation_is_shared(asked):
    words = ("selection=uniform,first", "kept=2", "distillation=0,5", "compression=none,int8", "unfreeze=none,norm")
    cells = make_cells(asked(*words, "seeds=2", "reference=false")).grid.cells
    assert {bool(cell.shares) for cell in cells if cell.values["distillation"] == "0"} == {False}
    groups = {}
    for cell in cells:
        groups.setdefault(cell.shares, set()).add((cell.values["selection"], cell.seed))
    del groups[""]
    assert sorted(next(iter(group)) for group in groups.values()) == [
        (name, seed) for name in ("first", "uniform") for seed in (0, 1)
    ]
    assert all(len(group) == 1 for group in groups.values())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["kept=9"], "the middle has 8 blocks"),
        (["kept=4,0.5"], "same number of blocks"),
        (["kept=2", "selection=first", "client.lerning_rate=1"], "did you mean 'client.learning_rate'"),
        (["kept=2", "compression=low_rank", "low_rank.share=7"], "share"),
        (["kept=0", "selection=first"], "keeps one or more"),
    ],
)
def test_mistakes_are_told_before_anything_runs(asked, words, told):
    given = words if any(word.startswith("selection") for word in words) else ["selection=uniform", *words]
    with pytest.raises(ConfigError) as caught:
        make_cells(asked(*given, "seeds=1"))
    assert told in str(caught.value)


def test_a_model_that_is_not_there_is_told(asked, tmp_path):
    with pytest.raises(ModelError):
        make_cells(asked("selection=uniform", "kept=2", "model=hf", f"model.name={tmp_path / 'no'}", "seeds=1"))


def test_depth_is_read_from_a_models_config(asked, model_folder):
    words = ("selection=uniform", "kept=0.5,1.0", "model=hf", f"model.name={model_folder}", "model.split.first=1")
    cells = make_cells(asked(*words, "model.split.last=1", "seeds=1", "reference=false"))
    assert of_cells(cells, "emulator", "kept_blocks") == [2, 4]


@pytest.mark.parametrize(("text", "kept"), [("0.5", 4), ("0.01", 1), ("1.0", 7), ("1", 1), ("0", 0), ("0.21", 1)])
def test_shares_are_rounded_and_at_least_one_block(text, kept):
    assert kept_of(text, 7) == kept


@pytest.fixture(scope="module")
def model_folder(miniature, tmp_path_factory):
    from fedpeat.models import save_model

    return save_model(miniature("llama", blocks=6), tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def make_blocks(miniature, make_ids, one_thread):
    """What a node's builder makes of a miniature's middle."""
    loaded, rows = miniature("llama", blocks=6), make_ids(rows=8, tokens=12)
    split = make_split(6, first=1, last=1)
    context = BuildContext(loaded.model, split, rows={"input_ids": rows, "labels": rows})
    return lambda node: make_emulator(loaded, split=split, builder=built(node), context=context)


@pytest.mark.parametrize("selection", selections())
def test_every_selection_is_built(selection, make_blocks):
    settings = {selection: {"rows": 4}} if selection not in PLACED else {}
    node = emulator_of(Choice(selection, (selection,), settings), 2, *PLAIN)
    assert isinstance(built(node), Builder)
    assert len({block.source for block in make_blocks(node).blocks}) == 2


PLACED = {"uniform", "first", "last", "middle_out", "random"}


@pytest.mark.parametrize(
    "compression",
    [*STAGES, "harmonizers+int8", "low_rank+int8", "ffn_channels+int4", "pruned", "ffn_channels+low_rank"],
)
@pytest.mark.parametrize("steps", [Choice("0"), STEPS], ids=["0", "2"])
def test_every_compression_is_built_before_and_after_distillation(compression, steps, make_blocks):
    node = emulator_of(Choice("uniform", ("uniform",)), 2, compressed(compression), steps)
    order = ["select", "harmonize", "train", "shrink", "shrink_low_rank", "store"]
    assert sorted(node["stages"], key=order.index) == list(node["stages"])
    blocks = make_blocks(node)
    assert {block.source for block in blocks.blocks} >= {1, 4}
    kinds = {change["kind"] for block in blocks.blocks for change in block.changes}
    assert len(kinds) >= len(compression.split("+"))
    assert any(note["what"] == "distillation" for note in blocks.notes) == bool(steps.names)


def test_what_is_called_impossible_is_refused_and_the_rest_is_not(make_blocks, miniature, tmp_path, one_thread):
    """The rules against what the code that would run does."""
    from fedpeat.bundles import build_emulated, open_bundle, write_bundle
    from fedpeat.emulators import check_map_back, full_view, unfrozen_names

    loaded, split = miniature("llama", blocks=6), make_split(6, first=1, last=1)
    whole = full_view(loaded, split)
    parts = [("attention",), ("mlp",), ("norm",)]
    wrong = []
    for selection, compression in itertools.product(("uniform", "cka"), ("", *STAGES)):
        settings = {"cka": {"rows": 4}} if selection == "cka" else {}
        if selection == "cka" and compression == "harmonizers":
            continue  # with blocks at every place there is nothing to stand in for
        node = emulator_of(Choice(selection, (selection,), settings), 2, compressed(compression), Choice("0"))
        bundle = write_bundle(loaded, split=split, emulator=make_blocks(node), folder=tmp_path)
        view = build_emulated(open_bundle(bundle.folder))
        for unfreeze, policy in itertools.product(parts, ("map_back", "discard")):
            expected = not why_not(node, kept=2, middle=4, unfreeze=unfreeze, policy=policy)
            try:
                names = unfrozen_names(view, unfreeze)
                possible = bool(check_map_back(view, whole, names)) if policy == "map_back" else True
            except ConfigError:
                possible = False
            if possible != expected:
                wrong.append((selection, compression, unfreeze, policy))
    assert wrong == []


def test_titles_leave_out_what_goes_without_saying():
    values = {"selection": "cka", "kept": "0", "compression": "none", "distillation": "5", "unfreeze": "none"}
    assert title_of(values) == "cka, kept 0, 5 steps"
    assert title_of({"selection": "whole model, LoRA", "kept": "—", "data": "text"}) == "whole model, LoRA, text"
