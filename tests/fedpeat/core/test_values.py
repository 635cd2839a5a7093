import json
import math

from fedpeat.core import METRICS, ClientFailure, Evaluation, RoundReport


def test_a_report_survives_json():
    report = RoundReport(
        round=2,
        clients={"a": {"train_loss": 1.5}},
        failures=(ClientFailure("b", 2, "timeout", "late"),),
        evaluations={
            "plug_in": Evaluation(loss=1.0, accuracy=0.5, tokens=10),
            "emulator_tuned": Evaluation(loss=1.0, accuracy=0.5, tokens=10, choice_accuracy=0.25),
        },
        bytes_down=10,
        bytes_up=20,
        seconds={"total": 1.0},
        metrics={"update_norm": 0.5},
    )
    assert RoundReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_reports_of_before_choices_are_read():
    plain = {"loss": 1.0, "accuracy": 0.5, "tokens": 10}
    rest = {"round": 1, "clients": {}, "failures": [], "bytes_down": 0, "bytes_up": 0, "seconds": {}, "metrics": {}}
    found = RoundReport.from_json({**rest, "evaluations": {"plug_in": plain}}).evaluations["plug_in"]
    assert found == Evaluation(1.0, 0.5, 10, None)
    assert "choice_accuracy" not in found.to_json()
    assert Evaluation(1.0, 0.5, 10, 0.0).to_json()["choice_accuracy"] == 0.0


def test_perplexity_is_exp_of_loss_and_never_overflows():
    assert Evaluation(2.0, 0, 1).perplexity == math.exp(2)
    assert Evaluation(1e4, 0, 1).perplexity == math.inf


def test_metric_names_are_unique():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
