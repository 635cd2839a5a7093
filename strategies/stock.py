"""Any stock strategy of Flower's own (`flwr.serverapp.strategy`) as a recipe, its state checkpointed by name."""

import gc
import inspect
import logging
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast, get_type_hints

import flwr.serverapp.strategy as flower_strategies
import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, Metadata, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedpeat.core import ClientUpdate, ConfigError, EngineError, Tensors, nearest, shorten, with_prefix
from fedpeat.wire import read_arrays, to_arrays
from fedpeat.wire.messages import ARRAYS, METRICS, WEIGHT
from strategies.recipe import Facts, Recipe, every_round, in_range
from strategies.reducers import Situation, Step, gathering, local_tensors, shares

OURS = {
    "fraction_train": "set clients.per_round",
    "min_train_nodes": "set clients.per_round and round.min_replies",
    "min_available_nodes": "set clients.count",
    "fraction_evaluate": "set evaluate_every",
    "min_evaluate_nodes": "set evaluate_every",
    "weighted_by_key": "set strategy.weight_by",
    "arrayrecord_key": "leave it out",
    "configrecord_key": "leave it out",
}
"""Keywords of Flower's classes for what FedPEAT does itself, with what to do instead."""

REFUSED = {
    "Strategy": "it is the abstract base of the others",
    "FedXgb": "it joins boosted trees, not tensors",
    "DifferentialPrivacy": "it wraps another strategy object, and its clients need Flower's own mods or messages",
}
"""Beginnings of names of classes that cannot be used, and why."""

LEAST_REPLIES = {"Bulyan": (4, 3)}
"""Classes that give nothing back for too few replies: `(k, n)` for `k * num_malicious_nodes + n`."""

NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}
"""How plain numbers are kept."""

PROXIMAL = "proximal-mu"
"""The one setting for clients, in Flower's words, that ours know too."""

GLOBAL = "global"
"""Stands, among a strategy's attributes, for the arrays it gave back last: Flower's loop keeps them in the dtype that
the strategy made, the federation in fp32. A keyword of the language is no attribute's name."""


def flower(*, name: str, options: Mapping[str, Any] | None = None, weight_by: str = "tokens") -> Recipe:
    """Return the recipe that runs a stock strategy of Flower's as it is.

    Each round makes a fresh object of the class, gives it back what it remembers, and hands it the clients' full local
    states. All that it remembers is named tensors, so that it is checkpointed.

    Args:
        name: The class in `flwr.serverapp.strategy`, such as `FedMedian`.
        options: Keywords of the class: numbers and strings.
        weight_by: `tokens`, `rows` or `equal`; Flower's `num-examples`.

    Raises:
        ConfigError: If the class is unknown or cannot be used, or an option does not fit.

    Source: the class's own docstring.
    Departures: none in the rule. Arrays are handed over in the order of their names (Krum's distances are sums over
        them), replies in the order of the plan. The federation adds fp32 steps: an entry that more than doubles, more
        than halves or changes its sign in a round can differ from Flower's by a unit in the last place of the larger of
        old and new. The strategy's own arrays are kept beside, in its dtype, so that nothing adds up.
    """
    kind = _find(name)
    chosen = dict(options or {})
    _check_options(name, kind, chosen)
    make = partial(_make, name, kind, chosen)
    facts = Facts("flower", _source(name, kind), note="Flower's own class; it gets full local states, not deltas.")
    return Recipe(
        "flower",
        gathering(partial(_reduce, name, make)),
        weight_by=weight_by,
        client=every_round(**_client_half(name, make())),
        facts=facts,
    )


def _classes() -> dict[str, type]:
    named = {name: getattr(flower_strategies, name) for name in flower_strategies.__all__}
    return {name: kind for name, kind in named.items() if issubclass(kind, flower_strategies.Strategy)}


def _why_not(name: str, kind: type) -> str:
    """Return why a class cannot be used, "" if it can."""
    for beginning, reason in REFUSED.items():
        if name.startswith(beginning):
            return reason
    return "" if issubclass(kind, FedAvg) else "it is not built on Flower's FedAvg"


def _find(name: str) -> type[FedAvg]:
    classes = _classes()
    usable = [known for known, kind in classes.items() if not _why_not(known, kind)]
    if name not in classes:
        raise ConfigError(f"strategy.name={name}", "Flower has no such strategy", nearest(str(name), usable))
    reason = _why_not(name, classes[name])
    if reason:
        raise ConfigError(f"cannot use strategy.name={name}", reason, f"choose from: {shorten(usable, 20)}")
    return classes[name]


def _check_options(name: str, kind: type[FedAvg], options: Mapping[str, Any]) -> None:
    hints, keywords = get_type_hints(kind.__init__), inspect.signature(kind).parameters
    known = {key: hints[key] for key in keywords if hints.get(key) in {float, int, str} and key not in OURS}
    for key, value in options.items():
        asked = f"cannot use strategy.options.{key}={value} with {name}"
        if key in OURS:
            raise ConfigError(asked, "FedPEAT does that part itself", OURS[key])
        if key in keywords and key not in known:
            raise ConfigError(asked, "it is a function, which no config can hold", "leave it out")
        if key not in known:
            found = f"its keywords are {shorten(known)}" if known else "it has no keywords of its own"
            raise ConfigError(asked, found, nearest(str(key), known) if known else "leave it out")
        if not _fits(value, known[key]):
            raise ConfigError(asked, f"it must be {known[key].__name__}", f"change strategy.options.{key}")
    for key in known:
        if keywords[key].default is inspect.Parameter.empty and key not in options:
            raise ConfigError(f"strategy.options.{key} must be given", f"{name} has no default for it", f"add {key}")


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int | float) and math.isfinite(value) if kind is float else isinstance(value, kind)


def _make(name: str, kind: type[FedAvg], options: Mapping[str, Any]) -> FedAvg:
    """Return a fresh object that samples no nodes: its `configure_train` only takes note of the arrays."""
    try:
        with _quietly():
            return kind(**options, fraction_train=0.0, fraction_evaluate=0.0)
    except ValueError as error:
        raise ConfigError(f"cannot make Flower's {name}", str(error), "change strategy.options") from error


def _configure(strategy: FedAvg, server_round: int, arrays: ArrayRecord) -> ConfigRecord:
    """Let `strategy` see a round's arrays, as before it sends them; return what it would have clients know."""
    config = ConfigRecord()
    with _quietly():
        strategy.configure_train(server_round, arrays, config, cast("Grid", None))
    return config


def _client_half(name: str, strategy: FedAvg) -> dict[str, Any]:
    try:
        config = dict(_configure(strategy, 1, ArrayRecord()))
    except Exception as error:
        raise ConfigError(
            f"cannot use strategy.name={name}", f"it chooses its clients itself ({error})", "choose another strategy"
        ) from error
    half = {}
    if PROXIMAL in config:
        half["proximal_mu"] = in_range("flower", "options.proximal_mu", cast("float", config.pop(PROXIMAL)), 0)
    if config:
        raise ConfigError(
            f"cannot use strategy.name={name}",
            f"it sends clients settings that they do not know: {shorten(config)}",
            "choose another strategy",
        )
    return half


def _source(name: str, kind: type) -> str:
    paper = re.search(r"arxiv\.org/\w+/(\d{4}\.\d{4,5})", kind.__doc__ or "")
    return f"Flower's {name}, arXiv {paper[1]}" if paper else f"Flower's {name}"


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep this thread's log lines of Flower's and numpy's warnings from the terminal: errors say what is wrong."""
    here, log = threading.get_ident(), logging.getLogger("flwr")

    def elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != here

    # Some of Flower's classes collect all garbage after every reply, a second each with a model library loaded; what is
    # frozen is not looked through.
    frozen = gc.get_freeze_count()
    gc.freeze()
    log.addFilter(elsewhere)
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        log.removeFilter(elsewhere)
        if not frozen:
            gc.unfreeze()


def _reduce(name: str, make: Callable[[], FedAvg], situation: Situation, updates: Sequence[ClientUpdate]) -> Step:
    """Return the step to the arrays that the strategy makes of a round's updates."""
    shares(updates)  # refuses weights that sum to 0, by which Flower divides
    strategy = make()
    _check_replies(name, strategy, len(updates))
    untouched = dict(vars(strategy))
    remembered = recall(situation.state.memory)
    kept = remembered.pop(GLOBAL, ArrayRecord())
    for attribute, value in remembered.items():
        setattr(strategy, attribute, value)
    old = {key: situation.state.tensors[key] for key in sorted({key for update in updates for key in update.delta})}
    arrays = ArrayRecord({key: kept.get(key) or array for key, array in to_arrays(old).items()})
    result = _run(name, strategy, situation, arrays, updates)
    new = read_arrays(result)
    if {key: tensor.shape for key, tensor in new.items()} != {key: tensor.shape for key, tensor in old.items()}:
        raise EngineError(
            f"Flower's {name} must give back the {len(old)} tensors that clients sent",
            f"it gave {shorten(new, 3) or 'none'}",
            "change strategy.options or choose another strategy",
        )
    memory = remember({**vars(strategy), GLOBAL: result}, untouched)
    return Step({key: new[key].to(tensor) - tensor for key, tensor in old.items()}, memory=memory)


def _check_replies(name: str, strategy: FedAvg, came: int) -> None:
    each, more = LEAST_REPLIES.get(name, (0, 0))
    least = each * getattr(strategy, "num_malicious_nodes", 0) + more
    if came < least:
        raise EngineError(
            f"Flower's {name} needs {least} updates ({each} * num_malicious_nodes + {more})",
            f"{came} came",
            "raise clients.per_round, or lower strategy.options.num_malicious_nodes",
        )


def _run(
    name: str, strategy: FedAvg, situation: Situation, arrays: ArrayRecord, updates: Sequence[ClientUpdate]
) -> ArrayRecord:
    remedy = "look at the clients' updates, change strategy.options, or choose another strategy"
    replies = _replies(situation, updates, list(arrays))
    _configure(strategy, situation.round, arrays)
    try:
        with _quietly():
            result, _ = strategy.aggregate_train(situation.round, replies)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        raise EngineError(f"Flower's {name} cannot aggregate {len(updates)} updates", found, remedy) from error
    if result is None:
        raise EngineError(f"Flower's {name} must make something of {len(updates)} updates", "it gave nothing", remedy)
    return result


def _replies(situation: Situation, updates: Sequence[ClientUpdate], names: Sequence[str]) -> list[Message]:
    """Return what Flower's loop would hold after a round: each client's full local state and its metrics."""
    # Flower wants the same metrics from all; the server's own training reports other ones than clients do.
    common = set.intersection(*(set(update.metrics) for update in updates))
    replies = []
    for node, update in enumerate(updates, start=1):
        metrics = {key: float(update.metrics[key]) for key in sorted(common)}
        content = RecordDict(
            {
                ARRAYS: to_arrays(local_tensors(situation.state, update, dict.fromkeys(names))),
                METRICS: MetricRecord({**metrics, WEIGHT: float(update.weight)}),
            }
        )
        metadata = Metadata(0, f"{node}", node, 0, "", f"{situation.round}", 0.0, 1.0, MessageType.TRAIN)
        # The public signatures read the process's task identity, which only a running Flower app has.
        replies.append(Message(content=content, metadata=metadata))  # pyright: ignore[reportCallIssue]
    return replies


def remember(attributes: Mapping[str, Any], untouched: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return a strategy object's state as named tensors, `attribute|kind|key`, bits unchanged.

    Args:
        attributes: The object's, by name.
        untouched: The same of a fresh object: plain values that are still its own are settings, not state.

    Raises:
        EngineError: If an attribute is neither arrays nor a plain number.

    >>> remember({"eta": 0.1, "m_t": {"w": np.zeros(2)}, "v_t": None}, {"eta": 0.1, "v_t": None})
    {'m_t|dict|w': tensor([0., 0.], dtype=torch.float64)}
    """
    memory: dict[str, torch.Tensor] = {}
    for attribute, value in attributes.items():
        setting = value is None or callable(value) or isinstance(value, bool | int | float | str)
        if setting and attribute in untouched and value is untouched[attribute]:
            continue
        try:
            kind, entries = _pack(value)
        except (TypeError, ValueError) as error:
            raise EngineError(
                f"cannot checkpoint {attribute!r} of Flower's strategy",
                str(error),
                "choose another strategy: only arrays and numbers survive a round",
            ) from error
        # An empty entry keeps the kind of a container without entries.
        memory |= with_prefix(f"{attribute}|{kind}|", entries or {"": torch.zeros(0)})
    return memory


def recall(memory: Tensors) -> dict[str, Any]:
    """Return the attributes that `remember` was given; entries of dicts and records come in the order of their names.

    >>> recall(remember({"count": 3, "m_t": [np.ones(2)]}, {}))
    {'count': 3, 'm_t': [array([1., 1.])]}
    """
    found: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for name in sorted(memory):
        attribute, kind, key = name.split("|", 2)
        found.setdefault((attribute, kind), {})[key] = memory[name]
    return {attribute: _unpack(kind, entries) for (attribute, kind), entries in found.items()}


def _pack(value: Any) -> tuple[str, dict[str, torch.Tensor]]:
    if value is None:
        return "none", {}
    if isinstance(value, ArrayRecord):
        return "record", read_arrays(value)
    if isinstance(value, np.ndarray | np.generic):  # before float: a numpy double is one, and mixes types otherwise
        return "array", {"": _tensor(value)}
    if type(value) in NUMBERS:
        return type(value).__name__, {"": torch.tensor(value, dtype=NUMBERS[type(value)])}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return "dict", {key: _tensor(item) for key, item in value.items()}
    if isinstance(value, list):
        return "list", {f"{place:06}": _tensor(item) for place, item in enumerate(value)}
    raise TypeError(f"it is of type {type(value).__name__}")


def _tensor(value: Any) -> torch.Tensor:
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"it holds an item of type {type(value).__name__}")
    return torch.from_numpy(np.array(value))


def _unpack(kind: str, entries: Tensors) -> Any:
    if kind in {"array", "bool", "int", "float"}:
        return entries[""].numpy().copy() if kind == "array" else entries[""].item()
    filled = {key: tensor for key, tensor in entries.items() if key}
    if kind == "record":
        return to_arrays(filled)
    arrays = {key: tensor.numpy().copy() for key, tensor in filled.items()}
    return {"none": None, "dict": arrays, "list": list(arrays.values())}[kind]
