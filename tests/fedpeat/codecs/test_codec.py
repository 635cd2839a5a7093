"""Laws of all codecs."""

import inspect
import json
import math

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedpeat import codecs
from fedpeat.codecs.described import BUILDERS
from fedpeat.core import ConfigError, UpdateRefused, count_bytes, digest
from fedpeat.wire import read_arrays, to_arrays
from tests.fedpeat.codecs.numbers import LISTS, from_seed

# The fixtures hold functions only.
# Every codec sees its own examples.
for_all = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
SUBNORMAL = 2.9062930150096706e-42
HUGE = torch.finfo(torch.float32).max

CODECS = [
    codecs.none(),
    codecs.bf16(),
    codecs.fp16(),
    codecs.int8(),
    codecs.int8(block_size=7),
    codecs.int4(),
    codecs.int4(block_size=1),
    codecs.top_k(),
    codecs.top_k(share=1),
    codecs.top_k_int8(),
    codecs.top_k_int8(share=0.35, block_size=3),
    codecs.drive(),
]


def pytest_generate_tests(metafunc):
    """Run a test for every codec if it asks for one."""
    if "codec" in metafunc.fixturenames:
        metafunc.parametrize("codec", CODECS, ids=lambda codec: "-".join(map(str, codec.description.values())))


def shapes_of(delta):
    return {name: tensor.shape for name, tensor in delta.items()}


def test_names_shapes_and_dtypes_come_back(codec, make_delta, send):
    delta = make_delta()
    decoded, _, _ = send(codec, delta)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in decoded.items()} == {
        name: (tensor.shape, torch.float32) for name, tensor in delta.items()
    }


@for_all
@given(LISTS)
@example([SUBNORMAL])
@example([HUGE, -HUGE])
@example([HUGE] * 128)
@example([0.0, -0.0])
def test_any_finite_delta_comes_back_finite(codec, send, values):
    delta = {"w": torch.tensor(values, dtype=torch.float32)}
    decoded, _, after = send(codec, delta)
    assert torch.isfinite(decoded["w"]).all()
    assert all(torch.isfinite(tensor).all() for tensor in after.values())


def test_zeros_come_back_as_zeros(codec, make_delta, send):
    delta = {name: torch.zeros_like(tensor) for name, tensor in make_delta().items()}
    decoded, _, after = send(codec, delta)
    assert all(torch.equal(decoded[name], delta[name]) for name in delta)
    assert not any(tensor.any() for tensor in after.values())


def test_arguments_stay_as_they_are(codec, make_delta):
    delta, state = make_delta(0), codec.start(make_delta(1))
    if codec.stateful:
        state = make_delta(2)
    before = digest(delta), digest(state)
    encoded, _ = codec.encode(delta, state, 3)
    sent = digest(encoded)
    decoded = codec.decode(encoded, shapes_of(delta))
    assert (digest(delta), digest(state), digest(encoded)) == (*before, sent)
    if codec.name != "none":
        for tensor in (*encoded.values(), *decoded.values()):
            tensor.zero_()
        assert (digest(delta), digest(state)) == before


def test_the_same_again_gives_the_same_bytes(codec, make_delta, send):
    first, second = (send(codec, make_delta(), seed=5) for _ in range(2))
    assert [digest(part) for part in first] == [digest(part) for part in second]


def test_other_tensors_do_not_matter(codec, make_delta, send):
    delta = make_delta()
    alone, _, _ = send(codec, {"row": delta["row"]}, seed=1)
    together, _, _ = send(codec, dict(reversed(delta.items())), seed=1)
    assert torch.equal(alone["row"], together["row"])


def test_layout_in_memory_does_not_matter(codec, send):
    across = torch.arange(60.0).reshape(6, 10).t()
    assert not across.is_contiguous()
    assert torch.equal(send(codec, {"w": across})[0]["w"], send(codec, {"w": across.contiguous()})[0]["w"])


def test_the_wire_changes_nothing(codec, make_delta, send):
    decoded, encoded, _ = send(codec, make_delta())
    received = read_arrays(to_arrays(encoded))
    again = codec.decode(received, shapes_of(make_delta()))
    assert all(torch.equal(again[name], decoded[name]) for name in decoded)
    assert count_bytes(received) == codecs.payload(encoded)


@for_all
@given(LISTS, st.builds(from_seed, st.just(150), st.integers(0, 2**32)))
@example([SUBNORMAL, 1e-38, -1e-30, 1.0], [1e-39, -1e-38, 1e-30, -1.0])
@example([1e-38, 1e-40, 0.0], [0.0] * 3)
def test_flushing_subnormals_changes_nothing(codec, send, values, more):
    if codec.name == "none":
        return
    delta = {"w": torch.tensor(values, dtype=torch.float32)}
    state = {"w": torch.tensor(more[: len(values)], dtype=torch.float32)} if codec.stateful else {}
    plain = [digest(part) for part in send(codec, delta, state)]
    able = torch.set_flush_denormal(True)
    try:
        flushed = send(codec, delta, state)
    finally:
        torch.set_flush_denormal(False)
    assert not able or [digest(part) for part in flushed] == plain


def blocks(count, size):
    return math.ceil(count / size)


def kept(count, share):
    return min(count, max(1, round(count * share)))


@pytest.mark.parametrize(
    ("codec_sent", "expected"),
    [
        (codecs.none(), lambda n: 4 * n),
        (codecs.bf16(), lambda n: 2 * n),
        (codecs.fp16(), lambda n: 2 * n),
        (codecs.int8(), lambda n: n + 4 * blocks(n, 64)),
        (codecs.int8(block_size=10), lambda n: n + 4 * blocks(n, 10)),
        (codecs.int4(block_size=10), lambda n: math.ceil(n / 2) + 4 * blocks(n, 10)),
        (codecs.top_k(share=0.25), lambda n: 8 * kept(n, 0.25)),
        (codecs.top_k_int8(share=0.25, block_size=4), lambda n: 5 * kept(n, 0.25) + 4 * blocks(kept(n, 0.25), 4)),
        (codecs.drive(), lambda n: 8 + 4 + max(128, 2 ** math.ceil(math.log2(max(n, 1)))) // 8),
    ],
    ids=lambda value: value.name if isinstance(value, codecs.Codec) else "",
)
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 128, 129, 1000])
def test_bytes_are_as_told(codec_sent, expected, count, send):
    _, encoded, _ = send(codec_sent, {"w": torch.ones(count)})
    assert codecs.payload(encoded) == count_bytes(encoded) == expected(count)


def test_only_codecs_that_say_so_keep_state(codec, make_delta, send):
    start = codec.start(make_delta())
    _, _, after = send(codec, make_delta())
    assert bool(start) == bool(after) == codec.stateful
    if codec.stateful:
        assert digest(start) == digest({name: torch.zeros_like(tensor) for name, tensor in make_delta().items()})


def altered(encoded, key, change):
    return {**encoded, key: change(encoded[key])}


LIES = {
    "another dtype": lambda part: part.to(torch.float64),
    "one entry more": lambda part: torch.cat((part, part[:1])),
    "one entry less": lambda part: part[:-1],
    "another shape": lambda part: part[None],
    "nothing": lambda part: part[:0],
}


@pytest.mark.parametrize("lie", LIES)
def test_parts_that_do_not_fit_are_refused(codec, send, lie):
    delta = {"w": torch.randn(30), "v": torch.randn(7)}
    _, encoded, _ = send(codec, delta)
    for key in encoded:
        with pytest.raises(UpdateRefused):
            codec.decode(altered(encoded, key, LIES[lie]), shapes_of(delta))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_parts_that_are_not_finite_are_refused(codec, send, value):
    delta = {"w": torch.randn(30), "v": torch.randn(7)}
    _, encoded, _ = send(codec, delta)
    tried = [key for key, part in encoded.items() if part.is_floating_point()]
    assert tried
    for key in tried:
        broken = encoded[key].clone()
        broken[-1] = value
        with pytest.raises(UpdateRefused, match="must be finite"):
            codec.decode({**encoded, key: broken}, shapes_of(delta))


def test_missing_and_unknown_parts_are_refused(codec, send):
    delta = {"w": torch.randn(30), "v": torch.randn(7)}
    _, encoded, _ = send(codec, delta)
    for key in encoded:
        with pytest.raises(UpdateRefused):
            codec.decode({other: part for other, part in encoded.items() if other != key}, shapes_of(delta))
    for key in ("x", "w|more", "|more", ""):
        with pytest.raises(UpdateRefused, match="unknown"):
            codec.decode({**encoded, key: encoded["w"]}, shapes_of(delta))
    with pytest.raises(UpdateRefused):
        codec.decode(encoded, shapes_of({**delta, "u": torch.zeros(2)}))
    with pytest.raises(UpdateRefused):
        codec.decode({}, shapes_of(delta))


def test_a_description_survives_json(codec, make_delta, send):
    again = codecs.from_description(json.loads(json.dumps(codecs.describe(codec))))
    assert again.name == codec.name == codec.description["name"]
    assert again.description == codec.description
    assert again.stateful == codec.stateful
    assert digest(send(again, make_delta())[1]) == digest(send(codec, make_delta())[1])


@pytest.mark.parametrize(
    "description",
    [
        None,
        [],
        "int8",
        {},
        {"name": None},
        {"name": ["int8"]},
        {"name": "int9", "block_size": 64},
        {"name": "__class__"},
        {"name": "none", "block_size": 64},
        {"name": "int8"},
        {"name": "int8", "block_size": 64, "bits": 2},
        {"name": "int8", "block_size": 0},
        {"name": "int8", "block_size": "64"},
        {"name": "int8", "block_size": True},
        {"name": "int4", "block_size": 6.5},
        {"name": "top_k", "share": 0},
        {"name": "top_k", "share": math.nan},
        {"name": "top_k", "share": [0.1]},
        {"name": "top_k_int8", "share": 0.1, "block_size": -1},
        {"name": "drive", 1: 2},
    ],
)
def test_descriptions_that_are_not_of_a_codec_are_refused(description):
    with pytest.raises(UpdateRefused, match="a codec's description must hold"):
        codecs.from_description(description)


def test_a_huge_block_size_costs_no_memory(send):
    codec = codecs.from_description({"name": "int8", "block_size": 10**30})
    assert codecs.payload(send(codec, {"w": torch.randn(5)})[1]) == 5 + 4


@pytest.mark.parametrize(
    ("builder", "keywords", "words"),
    [
        (codecs.int8, {"block_size": 0}, "block_size=0"),
        (codecs.int4, {"block_size": 2.0}, "block_size=2.0"),
        (codecs.top_k, {"share": 0}, "share=0"),
        (codecs.top_k, {"share": 1.1}, "share=1.1"),
        (codecs.top_k, {"share": True}, "share=True"),
        (codecs.top_k_int8, {"share": -0.1}, "share=-0.1"),
        (codecs.top_k_int8, {"block_size": "x"}, "block_size='x'"),
    ],
)
def test_settings_out_of_range_are_told(builder, keywords, words):
    with pytest.raises(ConfigError, match=words):
        builder(**keywords)


def test_every_config_binds_its_builder(pytestconfig):
    files = sorted((pytestconfig.rootpath / "conf" / "codec").glob("*.yaml"))
    assert {file.stem for file in files} == set(BUILDERS)
    assert set(BUILDERS) <= set(codecs.__all__)
    for file in files:
        node = OmegaConf.to_container(OmegaConf.load(file))
        room, _, name = node.pop("_target_").rpartition(".")
        assert (room, name) == ("fedpeat.codecs", file.stem)
        defaults = {key: value.default for key, value in inspect.signature(BUILDERS[name]).parameters.items()}
        assert node == defaults
        assert BUILDERS[name](**node).name == file.stem
