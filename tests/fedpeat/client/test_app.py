from types import SimpleNamespace

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity

from fedpeat.bundles import build_emulated, open_bundle
from fedpeat.client import Store, Task, TrainingSpec, app, work
from fedpeat.codecs import drive, from_description
from fedpeat.core import (
    EXTRA,
    FOLD,
    ClientUpdate,
    PeftError,
    UpdateRefused,
    at_rank,
    digest,
    with_prefix,
    zeros_like,
)
from fedpeat.emulators import uniform
from fedpeat.models import make_split
from fedpeat.peft import attach
from fedpeat.wire import read_failure, read_update, to_arrays, train_message
from tests.bundles import bundled

SPEC = {"learning_rate": 0.05, "batch_size": 4, "optimizer": "SGD"}
LORA = {"kind": "lora", "rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def bundle(miniature, tmp_path_factory):
    """The folder of a bundle of three blocks of four; the first and the last are the adapter."""
    split, folder = make_split(4, first=1, last=1), tmp_path_factory.mktemp("bundles")
    return bundled(miniature("llama", blocks=4), split=split, builder=uniform(kept_blocks=1), folder=folder).folder


@pytest.fixture(autouse=True)
def _fresh_worker(monkeypatch, rows):
    monkeypatch.setattr(app, "_MODELS", type(app._MODELS)())
    monkeypatch.setattr(app, "open_rows", lambda *_: rows)


@pytest.fixture
def job(bundle, tmp_path):
    """A client's job, and changes to it: `job(client="ann")`."""

    def make(**more):
        plain = {"bundle": str(bundle), "method": LORA, "seed": 3, "device": "cpu", "frozen_digest": ""}
        plain["data"] = str(tmp_path)  # rows come from the fixture
        plan = {"client": "sympy", "round": 1, "local_steps": 2, "start_step": 0, "total_steps": 8}
        recipe = {"weight_by": "tokens", "codec": {"name": "none"}, "extras": {}, "attack": None}
        return {**plain, **plan, **recipe, "spec": SPEC, "state_folder": str(tmp_path / "clients"), **more}

    return make


@pytest.fixture
def twin(bundle):
    """A maker of tuned models that the worker does not know of."""

    def make(method=LORA, seed=3):
        view = build_emulated(open_bundle(bundle))
        places = {"path": view.path, "sources": view.sources, "adapter_positions": view.adapter_positions}
        return attach(view.model, method=method, seed=seed, **places)

    return make


def ask(job, tensors):
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    message = train_message(job, to_arrays(tensors), node=1, ttl_seconds=None)
    message.metadata.__dict__["_message_id"] = "m"
    return app.handle_train(message, SimpleNamespace(node_config={}))


def random_like(tensors, seed=1, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(tensors[name].shape, generator=generator) for name in sorted(tensors)}


def by_work(tuned, rows, tensors, extras=None, store=None, number=1, **half):
    task = Task("sympy", 2, 2 * (number - 1), 8, 3, half)
    spec, kept = TrainingSpec(**SPEC), store or Store(None, "sympy")
    return work(tuned, rows, task=task, spec=spec, tensors=tensors, extras=extras or {}, store=kept)


def test_a_message_is_worked_off_and_answered(job, twin, rows):
    tuned = twin()
    tensors = random_like(tuned.initial)
    update = read_update(ask(job(), tensors))
    wanted = by_work(tuned, rows, tensors)
    assert digest(update.delta) == digest(wanted.delta)
    assert (update.client, update.round, update.weight) == ("sympy", 1, wanted.metrics["train_tokens"])
    assert update.encoding == {"name": "none"}
    assert update.extras == {}
    assert {"train_rows", "client_seconds", "peak_rss_mib", "process", "effective_steps"} <= set(update.metrics)
    assert update.payload_bytes == sum(4 * tensor.numel() for tensor in tensors.values())


def test_folds_are_in_the_model_for_this_round_alone(job, twin, rows):
    tuned = twin()
    tensors = random_like(tuned.initial)
    folds = {pair.module: torch.full(pair.shape, 0.02) for pair in tuned.layout.pairs}
    plain = digest(read_update(ask(job(), tensors)).delta)
    folded = digest(read_update(ask(job(), {**tensors, **with_prefix(FOLD, folds)})).delta)
    assert digest(read_update(ask(job(), tensors)).delta) == plain
    tuned.fold(folds)
    assert folded == digest(by_work(tuned, rows, tensors).delta) != plain


def test_what_a_recipe_sends_and_asks_for_beside_the_delta(job, twin, rows, tmp_path):
    tuned, store = twin(), Store(tmp_path / "twin", "sympy")
    tensors, common = random_like(tuned.initial), random_like(tuned.initial, 2)
    half = {"control_variates": True, "probe_rows": 4}
    for number, extras in ((1, zeros_like(common)), (2, common)):
        asked = job(extras=half, round=number, start_step=2 * (number - 1))
        update = read_update(ask(asked, {**tensors, **with_prefix(EXTRA, extras)}))
        wanted = by_work(tuned, rows, tensors, extras, store, number, **half)
        assert digest(update.delta) == digest(wanted.delta)
        assert digest(update.extras) == digest(wanted.extras)
        assert update.metrics["start_loss"] == wanted.metrics["start_loss"]
        assert update.payload_bytes == 2 * sum(4 * tensor.numel() for tensor in tensors.values())


def test_a_model_is_built_once_for_each_bundle_method_and_seed(job):
    """Tensors that do not travel start at random: a worker that serves runs of two seeds has two models."""
    first = app.tuned_model(job(seed=1))
    assert app.tuned_model(job(seed=1, client="ann", round=5, start_step=7)) is first
    other = app.tuned_model(job(seed=2))
    names = first.layout.names(["A"])
    assert names
    assert not any(torch.equal(first.initial[name], other.initial[name]) for name in names)
    small = app.tuned_model(job(seed=1, method={**LORA, "rank": 2, "alpha": 4}))
    assert small.layout.rank == 2
    assert app.tuned_model(job(seed=1)) is first


def test_two_seeds_at_one_worker_do_not_mix(job, twin, rows):
    half = {"train_only": ["B"], "fixed": ["A"]}
    for seed in (3, 4, 3):
        tuned = twin(seed=seed)
        sent = {name: tensor for name, tensor in random_like(tuned.initial).items() if ".lora_B." in name}
        found = read_update(ask(job(seed=seed, extras=half), sent)).delta
        task = Task("sympy", 2, 0, 8, seed, half)
        store = Store(None, "sympy")
        spec = TrainingSpec(**SPEC)
        wanted = work(tuned, rows, task=task, spec=spec, tensors=sent, extras={}, store=store).delta
        assert digest(found) == digest(wanted)


def test_the_least_recently_used_model_makes_room(job):
    for seed in range(app.KEPT_MODELS):
        app.tuned_model(job(seed=seed))
    oldest = app.tuned_model(job(seed=0))
    app.tuned_model(job(seed=99))
    assert len(app._MODELS) == app.KEPT_MODELS
    assert app.tuned_model(job(seed=0)) is oldest


def test_frozen_tensors_that_are_not_the_servers_are_told(job):
    with pytest.raises(PeftError, match="must be the server's"):
        app.tuned_model(job(method={"kind": "lora_sb", "rank": 2}))
    failed = ask(job(frozen_digest="other"), {})
    assert failed.has_error()
    assert "use the same versions" in read_failure(failed, client="sympy", server_round=1).reason


def test_failures_are_told_in_one_line(job, twin, monkeypatch):
    tensors = dict(twin().initial)
    short = dict(list(tensors.items())[1:])
    reason = read_failure(ask(job(), short), client="sympy", server_round=1).reason
    assert "1 are missing" in reason
    monkeypatch.setattr(app, "work", lambda *_, **__: 1 / 0)
    assert (
        read_failure(ask(job(), tensors), client="sympy", server_round=1).reason
        == "ZeroDivisionError: division by zero"
    )
    monkeypatch.setenv("FEDPEAT_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        ask(job(), tensors)


def test_an_attack_is_made_on_the_delta_and_then_encoded(job, twin):
    tensors = random_like(twin().initial)
    honest = read_update(ask(job(), tensors)).delta
    flipped = read_update(ask(job(attack={"kind": "sign_flip", "factor": 2.0}), tensors)).delta
    assert digest(flipped) == digest({name: -2 * tensor for name, tensor in honest.items()})
    bf16 = {"name": "bf16"}
    small = read_update(ask(job(attack={"kind": "scale", "factor": 2.0}, codec=bf16), tensors))
    assert small.payload_bytes == sum(2 * tensor.numel() for tensor in tensors.values())
    shapes = {name: tensor.shape for name, tensor in honest.items()}
    found = from_description(bf16).decode(small.delta, shapes)
    assert digest(found) == digest({name: (2 * tensor).bfloat16().float() for name, tensor in honest.items()})
    shuffled = read_update(ask(job(attack={"kind": "shuffle_labels", "factor": 1.0}), tensors)).delta
    assert digest(shuffled) != digest(honest)


def test_a_device_of_a_smaller_rank_is_sent_and_sends_its_own(job, twin):
    tuned = twin()
    method = {**LORA, "rank": 2, "alpha": 4}
    tensors = at_rank(random_like(tuned.initial), tuned.layout, 2)
    update = read_update(ask(job(method=method), tensors))
    assert {name: tensor.shape for name, tensor in update.delta.items()} == {n: t.shape for n, t in tensors.items()}


TOP = {"name": "top_k", "share": 0.25}


def make_update(delta, number=1):
    return ClientUpdate("sympy", number, delta, 1.0)


def decoded(update):
    codec = from_description(update.encoding)
    return codec.decode(update.delta, {"w": torch.Size((2, 4)), "v": torch.Size((4,))})


def test_what_was_not_sent_is_added_to_the_next_delta(tmp_path):
    store, job = Store(tmp_path, "sympy"), {"codec": TOP, "seed": 1}
    first = {"w": torch.arange(8.0).reshape(2, 4), "v": torch.tensor([1.0, -4.0, 2.0, 3.0])}
    sent = app.encoded(make_update(first), job, store)
    assert sent.encoding == TOP
    assert decoded(sent)["w"].tolist() == [[0, 0, 0, 0], [0, 0, 6, 7]]
    assert decoded(sent)["v"].tolist() == [0, -4, 0, 0]
    assert store.read("codec")["w"].tolist() == [[0, 1, 2, 3], [4, 5, 0, 0]]

    again = app.encoded(make_update({"w": torch.ones(2, 4), "v": torch.zeros(4)}, 2), job, store)
    assert decoded(again)["w"].tolist() == [[0, 0, 0, 0], [5, 6, 0, 0]]
    assert decoded(again)["v"].tolist() == [0, 0, 0, 3]
    assert store.read("codec")["w"].tolist() == [[1, 2, 3, 4], [0, 0, 1, 1]]
    assert store.read("codec")["v"].tolist() == [1, 0, 2, 0]


def test_what_is_left_of_a_part_waits_until_that_part_is_sent_again(tmp_path):
    store, job = Store(tmp_path, "sympy"), {"codec": TOP, "seed": 1}
    app.encoded(make_update({"w": torch.arange(8.0).reshape(2, 4)}), job, store)
    app.encoded(make_update({"v": torch.tensor([1.0, -4.0, 2.0, 3.0])}, 2), job, store)
    assert set(store.read("codec")) == {"w", "v"}
    both = app.encoded(make_update({"w": torch.zeros(2, 4), "v": torch.zeros(4)}, 3), job, store)
    assert decoded(both)["w"].tolist() == [[0, 0, 0, 0], [4, 5, 0, 0]]
    assert decoded(both)["v"].tolist() == [0, 0, 0, 3]


def test_each_client_has_its_own_residual_and_a_plain_codec_keeps_none(tmp_path):
    delta = {"w": torch.arange(8.0).reshape(2, 4)}
    app.encoded(make_update(delta), {"codec": TOP, "seed": 1}, Store(tmp_path, "sympy"))
    assert Store(tmp_path, "ann").read("codec") == {}
    app.encoded(make_update(delta), {"codec": {"name": "int8", "block_size": 64}, "seed": 1}, Store(tmp_path, "ann"))
    assert Store(tmp_path, "ann").read("codec") == {}


def test_random_codecs_follow_seed_client_and_round():
    delta = {"w": torch.randn(2, 40, generator=torch.Generator().manual_seed(0))}
    codec = dict(drive().description)

    def sent(client="sympy", number=1, seed=1):
        update = ClientUpdate(client, number, delta, 1.0)
        return digest(app.encoded(update, {"codec": codec, "seed": seed}, Store(None, client)).delta)

    assert sent() == sent()
    assert len({sent(), sent("ann"), sent(number=2), sent(seed=2)}) == 4


def test_an_unknown_codec_is_refused():
    with pytest.raises(UpdateRefused, match="no codec is named 'zip'"):
        app.encoded(make_update({"w": torch.ones(2)}), {"codec": {"name": "zip"}, "seed": 1}, Store(None, "a"))
