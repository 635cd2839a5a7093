from fedpeat.core import METRICS


def test_every_metric_is_explained():
    for metric in METRICS:
        assert metric.unit
        assert metric.meaning.endswith(".")
        assert metric.better in {"down", "up", ""}
