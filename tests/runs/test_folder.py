"""What a run leaves in its folder is all there, agrees with itself, and can be used by others."""

import json
import re
import warnings
from html.parser import HTMLParser

import pytest
import yaml

from fedpeat.core import ConfigError, EngineError
from simulations.keeping import settings_to_resume
from simulations.run import simulate
from tests.oracles import whole_run as oracle

MODELS = {"full_zero_shot", "emulator_zero_shot", "emulator_tuned", "plug_in"}
LEARNING = ("rounds=3", "client.local_steps=3", "client.learning_rate=0.01")
EVERYTHING = (*LEARNING, "export=true", "report=true")


@pytest.fixture
def whole(run, whole_folder):
    """A run with everything in its folder, made once for this file."""
    if not (whole_folder / "summary.json").exists():
        run(*EVERYTHING, folder=whole_folder)
    return whole_folder


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("whole") / "made" / "by the run"


@pytest.fixture
def ran(whole, open_run):
    return open_run(whole)


def test_every_file_is_there(whole):
    files = ("config.yaml", "config.sha", "metrics.jsonl", "summary.json", "report.html", "clients.json", "log.jsonl")
    for name in files:
        assert (whole / name).stat().st_size > 0, name
    for name in ("checkpoint/round-000002.safetensors", "export/model/model.safetensors"):
        assert (whole / name).stat().st_size > 0, name
    pictures = {path.stem for path in (whole / "figures").glob("*.png")}
    assert {"learning_curves", "privacy_margin", "client_loss", "bytes", "seconds", "clients"} <= pictures
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (whole / "figures").glob("*.png"))
    leftovers = [path for path in whole.rglob("*") if path.name.startswith(".") and path.name != ".lock"]
    assert leftovers == []


def test_the_config_makes_the_same_run_again(ran, tiny):
    """It is what the command line makes of the same overrides, too: `run` takes a shorter way."""
    from simulations.settings import load_settings, settings_hash

    written = yaml.safe_load((ran.folder / "config.yaml").read_text())
    assert written == load_settings(tiny(*EVERYTHING))
    hashed = (ran.folder / "config.sha").read_text().strip()
    assert hashed == ran.summary["config_hash"] == settings_hash(written)


def test_the_history_has_a_line_for_every_round(ran):
    assert [line["round"] for line in ran.rounds] == [0, 1, 2, 3]
    assert ran.rounds[0]["clients"] == {}
    assert ran.rounds[0]["bytes_down"] == ran.rounds[0]["bytes_up"] == 0
    for line in ran.rounds:
        assert set(line["evaluations"]) == MODELS
        assert line["failures"] == []
    for line in ran.rounds[1:]:
        assert set(line["clients"]) == {"ann", "bob", "eve"}
        for metrics in line["clients"].values():
            assert metrics["train_examples"] == 3 * 2
            assert metrics["train_tokens"] == 3 * 2 * 16
            assert metrics["delta_norm"] > 0


def test_evaluations_can_be_less_often(run):
    lines = run("rounds=5", "evaluate_every=2", "client.local_steps=1").rounds
    assert [bool(line["evaluations"]) for line in lines] == [True, False, True, False, True, True]


def test_the_summary_has_every_promised_key(ran):
    summary = ran.summary
    assert set(summary["metrics"]) == MODELS
    for metrics in summary["metrics"].values():
        assert {"loss", "perplexity", "accuracy"} <= set(metrics)
        assert metrics["perplexity"] == pytest.approx(2.718281828459045 ** metrics["loss"])
        assert 0 <= metrics["accuracy"] <= 1
    assert set(summary["bytes"]) == {"down", "up", "bundle"}
    assert {"total", "train", "evaluate", "overhead"} <= set(summary["seconds"])
    assert summary["tokens_per_second"] > 0
    assert summary["peak_rss_mib"] > 0
    assert summary["clients_failed"] == 0
    assert summary["status"] == "finished"
    assert summary["rounds"] == summary["rounds_planned"] == summary["evaluated_round"] == 3
    assert {"python", "fedpeat", "torch", "transformers", "peft", "flwr"} <= set(summary["versions"])


def test_the_summary_is_the_history_added_up(ran):
    summary, lines = ran.summary, ran.rounds
    for way in ("down", "up"):
        total = sum(client[f"bytes_{way}"] for line in lines for client in line["clients"].values())
        assert summary["bytes"][way] == total == sum(line[f"bytes_{way}"] for line in lines)
    last = lines[-1]["evaluations"]
    assert {name: metrics["loss"] for name, metrics in last.items()} == ran.losses
    assert summary["privacy_margin"] == pytest.approx(last["emulator_tuned"]["loss"] - last["plug_in"]["loss"])
    assert summary["train_tokens"] == 3 * 3 * 3 * 2 * 16
    parts = sum(value for name, value in summary["seconds"].items() if name != "total")
    assert summary["seconds"]["total"] == pytest.approx(parts)


def log_of(ran):
    return [json.loads(line) for line in (ran.folder / "log.jsonl").read_text().splitlines()]


def test_the_log_tells_what_happened_in_its_order(ran):
    found = log_of(ran)
    events = [line["event"] for line in found]
    assert (events[0], events[-1]) == ("run started", "run finished")
    rounds = [(line["event"], line["round"]) for line in found if "round" in line]
    started, finished = "round started", "round finished"
    pairs = [(event, number) for number in (1, 2, 3) for event in (started, finished)]
    assert rounds == [(finished, 0), *pairs]
    assert found[0]["config"] == ran.summary["config_hash"]
    done = [line for line in found if line["event"] == finished]
    for line, report in zip(done, ran.rounds, strict=True):
        assert (line["bytes_down"], line["bytes_up"]) == (report["bytes_down"], report["bytes_up"])
        assert line["loss"] == {name: result["loss"] for name, result in report["evaluations"].items()}
        assert (line["clients"], line["failed"]) == (len(report["clients"]), 0)
    assert (found[-1]["rounds"], found[-1]["bytes"]) == (3, ran.summary["bytes"])
    assert [line["time"] for line in found] == sorted(line["time"] for line in found)


def test_a_run_that_goes_on_adds_to_its_log_and_one_that_fails_says_why(run, tmp_path):
    ran = run("rounds=1", folder=tmp_path)
    before = log_of(ran)
    simulate(settings_to_resume(tmp_path, ["rounds=2"]), tmp_path, resume=True)
    found = log_of(ran)
    assert found[: len(before)] == before
    later = [(line["event"], line.get("round")) for line in found[len(before) :] if line["event"] != "message"]
    assert later[:2] == [("run started", None), ("run resumed", 1)]
    assert later[2:] == [("round started", 2), ("round finished", 2), ("run finished", None)]
    with pytest.raises(EngineError):
        run("round.max_update_norm=1e-12", folder=tmp_path / "failed")
    lines = [json.loads(line) for line in (tmp_path / "failed" / "log.jsonl").read_text().splitlines()]
    refused = [line for line in lines if line["event"] == "update refused"]
    assert [line["client"] for line in refused] == ["ann", "bob", "eve"]
    assert all("round.max_update_norm" in line["text"] for line in refused)
    assert (lines[-1]["event"], lines[-1]["level"], lines[-1]["error"]) == ("run failed", "error", "EngineError")


def test_training_helps(ran):
    for tuned, before in (("plug_in", "full_zero_shot"), ("emulator_tuned", "emulator_zero_shot")):
        assert ran.losses[tuned] < ran.losses[before] - 0.1
    first = ran.rounds[0]["evaluations"]
    assert first["plug_in"]["loss"] == first["full_zero_shot"]["loss"]
    assert first["emulator_tuned"]["loss"] == first["emulator_zero_shot"]["loss"]


def test_the_clients_table_is_the_texts(ran, notes, read_json):
    table = {client["client"]: client for client in read_json(ran.folder / "clients.json")}
    assert set(table) == {"ann", "bob", "eve"}
    for name, client in table.items():
        assert client["rows"] == len(oracle.read_rows(notes, 16, name))
        assert client["documents"] == 12


def test_the_bundle_is_as_large_as_its_tensors(ran, model_folder):
    """Blocks 0, 1, 4 and 5, and all that is outside the blocks."""
    model = oracle.load(model_folder())
    dropped = ("model.layers.2.", "model.layers.3.")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    kept = {name: tensor for name, tensor in tensors if not name.startswith(dropped)}
    parameters = sum(tensor.nbytes for tensor in kept.values() if isinstance(tensor, oracle.nn.Parameter))
    assert parameters <= ran.summary["bytes"]["bundle"] <= sum(tensor.nbytes for tensor in kept.values())


class Links(HTMLParser):
    """Everything on a page that a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.words = []

    def handle_starttag(self, tag, attrs):
        self.found += [(tag, value) for name, value in attrs if name in {"src", "href", "xlink:href", "srcset", "data"}]
        if tag in {"script", "link", "iframe", "object", "embed"}:
            self.found.append((tag, "a tag that fetches or runs"))

    def handle_data(self, data):
        self.words.append(data)


def test_the_report_needs_nothing_else(ran):
    text = (ran.folder / "report.html").read_text()
    page = Links()
    page.feed(text)
    assert [link for link in page.found if not link[1].startswith(("data:", "#"))] == []
    assert re.findall(r"url\((?!['\"]?(?:data:|#))", text) == []
    assert "@import" not in text
    words = " ".join(page.words)
    for word in (
        "Plug-in",
        "ann",
        "bob",
        "eve",
        "kept_blocks",
        f"{ran.summary['metrics']['plug_in']['perplexity']:.3g}",
    ):
        assert word in words
    assert text.count("<svg") >= 3


def test_the_exported_model_is_the_plug_in_model(ran, held_out):
    from transformers import AutoTokenizer

    model = oracle.load(ran.folder / "export" / "model")
    assert oracle.loss_of(model, oracle.read_rows(held_out, 16)) == pytest.approx(ran.losses["plug_in"], rel=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(ran.folder / "export" / "model")
    assert tokenizer.decode(tokenizer("river boat", add_special_tokens=False)["input_ids"]) == "river boat"


def test_the_exported_adapter_on_the_full_model_is_the_plug_in_model(ran, model_folder, held_out):
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(oracle.load(model_folder()), ran.folder / "export" / "adapter").eval()
    assert oracle.loss_of(model, oracle.read_rows(held_out, 16)) == pytest.approx(ran.losses["plug_in"], rel=1e-6)


def test_the_checkpoint_holds_the_tensors_of_the_last_round(ran, model_folder, held_out):
    model, parameters = oracle.set_up(model_folder(), adapter=(0, 5), kept=(1, 2, 3, 4), rank=8)
    oracle.write(parameters, ran.tensors)
    assert set(ran.tensors) == set(parameters)
    assert oracle.loss_of(model, oracle.read_rows(held_out, 16)) == pytest.approx(ran.losses["plug_in"], rel=1e-6)


def test_the_command_line_makes_the_same_run(command, tiny, ran, open_run, tmp_path):
    folder = tmp_path / "told"
    code, out, err = command(*tiny(*LEARNING), f"hydra.run.dir={folder}")
    assert code == 0, err
    told = open_run(folder)
    assert told.digest == ran.digest
    assert told.losses == ran.losses
    assert told.summary["config_hash"] == ran.summary["config_hash"]
    assert str(folder) in out
    assert not (folder / "report.html").exists()


def test_a_second_run_in_the_same_folder_is_refused(run, tmp_path):
    """Its history would be added to, and clients would go on from what they kept."""
    chosen = ("rounds=2", "client.local_steps=1", "client.optimizer_state=keep")
    first = run(*chosen, folder=tmp_path / "again")
    with pytest.raises(ConfigError, match="there is a run in it"):
        run(*chosen, folder=tmp_path / "again")
    again = run(*chosen, folder=tmp_path / "another")
    assert again.digest == first.digest
    assert again.summary["bytes"] == first.summary["bytes"]
