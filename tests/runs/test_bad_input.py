"""Whatever is asked wrongly is told in three parts on one screen, and a run that is cut short leaves a valid folder."""

import shutil

import pytest
import yaml

CONFIG_ERROR, FAILURE, INTERRUPTED = 2, 1, 130


@pytest.fixture
def refused(command, tiny, tmp_path):
    """What is said of a run that must not be: `refused(*overrides)` gives the exit code and the three parts."""

    def call(*overrides, without=(), parts_told=("error", "found", "do")):
        code, out, err = command(*tiny(*overrides, without=without), f"hydra.run.dir={tmp_path / 'out'}")
        assert code in {CONFIG_ERROR, FAILURE}, out
        assert "Traceback" not in out + err
        parts = {}
        for line in err.splitlines():
            label, _, text = line.strip().partition(": ")
            if label in {"error", "found", "do"}:
                parts[label] = text
        assert tuple(parts) == parts_told, err
        assert all(parts.values())
        assert len(err) < 1500
        return code, parts

    return call


# What is asked, the exit code, what the first line names, what the last one advises.
CASES = {
    "option": (["peft=lorra"], CONFIG_ERROR, "peft=lorra", "did you mean 'lora'?"),
    "key": (["client.lerning_rate=0.1"], CONFIG_ERROR, "client.lerning_rate", "did you mean 'client.learning_rate'?"),
    "kept blocks": (["emulator.kept_blocks=5"], CONFIG_ERROR, "keep 5", "emulator.kept_blocks <= 4"),
    "file": (["data.path=nowhere.jsonl"], FAILURE, "nowhere.jsonl", "data.path"),
    "text field": (["data.text_field=txet"], FAILURE, "txet", "did you mean 'text'?"),
    "client field": (["data.client_field=auther"], FAILURE, "auther", "did you mean 'author'?"),
    "more clients than the data has": (["clients.count=9"], FAILURE, "clients.count=9", "at most 3"),
    "more clients than documents": (
        ["data.client_field=null", "clients.count=1000"],
        FAILURE,
        "1000 clients",
        "clients.count <= 36",
    ),
    "sampled clients": (["clients.per_round=4"], CONFIG_ERROR, "clients.per_round=4", "between 1 and 3"),
    "no sampled clients": (["clients.per_round=0"], CONFIG_ERROR, "clients.per_round=0", "between 1 and 3"),
    "model": (["model.name=./nowhere"], FAILURE, "nowhere", "model"),
    "dtype": (["model.dtype=float31"], CONFIG_ERROR, "float31", "float32"),
    "steps": (["client.local_steps=0"], CONFIG_ERROR, "client.local_steps", "client.local_steps"),
    "rounds": (["rounds=-1"], CONFIG_ERROR, "rounds", "rounds"),
    "server without data": (["server.train=full"], CONFIG_ERROR, "server.train=full", "data.server_share"),
    "targets": (["peft.targets=[q_prjo]"], FAILURE, "q_prjo", "peft.targets"),
    "weights of clients": (["strategy.weight_by=token"], CONFIG_ERROR, "weight_by=token", "did you mean 'tokens'?"),
    "workers": (["engine=ray", "engine.workers=0"], CONFIG_ERROR, "engine.workers=0", "engine.workers"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_told(case, refused):
    overrides, expected, asked, remedy = CASES[case]
    code, parts = refused(*overrides)
    assert code == expected, parts
    assert asked in parts["error"], parts
    assert remedy in parts["do"], parts


def test_a_missing_value_is_asked_for(refused):
    _, parts = refused(without=("model.name",))
    assert "model.name" in parts["error"] + parts["do"]


def test_empty_text_is_told(refused, tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text('{"author": "ann", "text": ""}\n{"author": "ann", "text": "   "}\n')
    code, parts = refused(f"data.path={path}")
    assert code == FAILURE
    assert "2 are empty" in parts["found"]
    assert "data.path" in parts["do"]


def test_an_empty_file_is_told(refused, tmp_path):
    path = tmp_path / "nothing.jsonl"
    path.write_text("")
    code, parts = refused(f"data.path={path}")
    assert code == FAILURE
    assert "nothing.jsonl" in parts["error"] + parts["found"]


def test_damaged_json_is_told(refused, tmp_path):
    path = tmp_path / "torn.jsonl"
    path.write_text('{"author": "ann", "text": "whole"}\n{"author": "ann", "te')
    code, parts = refused(f"data.path={path}")
    assert code == FAILURE
    assert "torn.jsonl" in parts["error"] + parts["found"]


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_model_without_a_row_of_blocks_is_told(blocks, refused, model_folder):
    code, parts = refused(f"model.name={model_folder(blocks=blocks)}")
    assert code == FAILURE
    assert "block" in parts["error"] + parts["found"]


def test_pickled_weights_are_never_opened(refused, model_folder, tmp_path):
    """The pickle would leave a file behind if anybody opened it."""
    folder = tmp_path / "pickled"
    shutil.copytree(model_folder(), folder)
    (folder / "model.safetensors").unlink()
    trap, mark = folder / "pytorch_model.bin", tmp_path / "opened"
    trap.write_bytes(b"cbuiltins\nopen\n(V" + str(mark).encode() + b"\nVw\ntR.")
    code, parts = refused(f"model.name={folder}")
    assert code == FAILURE
    assert "safetensors" in parts["found"] + parts["do"]
    assert not mark.exists()


def test_a_torn_model_file_is_told(refused, model_folder, tmp_path):
    folder = tmp_path / "torn"
    shutil.copytree(model_folder(), folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    code, parts = refused(f"model.name={folder}")
    assert code == FAILURE
    assert "torn" in parts["error"]


def test_a_mistake_in_the_config_makes_no_folder(refused, tmp_path):
    refused("client.lerning_rate=0.1")
    assert not (tmp_path / "out").exists()


def test_a_failed_run_says_so_in_its_folder(refused, tmp_path, read_json):
    refused("client.learning_rate=1e30", "client.clip_norm=null", "client.optimizer=SGD")
    summary = read_json(tmp_path / "out" / "summary.json")
    assert summary["status"] == "failed"
    assert summary["rounds"] in {0, 1}
    assert summary["metrics"]["full_zero_shot"]["loss"] > 0


@pytest.fixture
def press_ctrl_c(monkeypatch):
    """Have the person at the keyboard press Ctrl-C when that many clients are done."""
    from simulations.progress import Progress

    def press(after):
        seen = []
        told = Progress.client_done

        def client_done(self, name, metrics):
            told(self, name, metrics)
            seen.append(name)
            if len(seen) == after:
                raise KeyboardInterrupt

        monkeypatch.setattr(Progress, "client_done", client_done)

    return press


def test_an_interrupted_run_leaves_a_valid_folder(press_ctrl_c, command, tiny, tmp_path, open_run):
    press_ctrl_c(5)
    folder = tmp_path / "cut"
    code, out, err = command(*tiny("rounds=3", "export=true", "report=true"), f"hydra.run.dir={folder}")
    assert code == INTERRUPTED, err
    assert "Traceback" not in out + err
    ran = open_run(folder)
    assert ran.summary["status"] == "interrupted"
    assert (ran.summary["rounds"], ran.summary["rounds_planned"]) == (1, 3)
    assert [line["round"] for line in ran.rounds] == [0, 1]
    assert ran.summary["metrics"]["plug_in"] == ran.rounds[-1]["evaluations"]["plug_in"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["rounds"] == 3
    assert "interrupted" in (folder / "report.html").read_text()


@pytest.mark.parametrize(("after", "rounds"), [(1, 0), (5, 1)])
def test_what_was_done_before_an_interruption_is_what_a_whole_run_does(after, rounds, press_ctrl_c, run, tmp_path):
    whole = run("rounds=3")
    press_ctrl_c(after)
    cut = run("rounds=3", folder=tmp_path / "cut")
    assert cut.summary["status"] == "interrupted"
    assert len(cut.rounds) == rounds + 1
    for line, other in zip(cut.rounds, whole.rounds, strict=False):
        assert line["evaluations"] == other["evaluations"]
        assert line["bytes_up"] == other["bytes_up"]


def test_an_interruption_before_any_data_leaves_a_valid_folder(command, tiny, monkeypatch, tmp_path, read_json):
    import simulations.run

    def press(_settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(simulations.run, "prepare_data", press)
    code, _, err = command(*tiny(), f"hydra.run.dir={tmp_path / 'cut'}")
    assert code == INTERRUPTED, err
    summary = read_json(tmp_path / "cut" / "summary.json")
    assert summary["status"] == "interrupted"
    assert summary["metrics"]["plug_in"]["loss"] is None
