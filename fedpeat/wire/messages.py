"""The messages of a federation: a job to a device, its update or failure back."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict

from fedpeat.core import EXTRA, ClientFailure, ClientUpdate, UpdateRefused, count_bytes, with_prefix, without_prefix
from fedpeat.wire.records import read_arrays, to_arrays

# Flower's own strategies look for these names.
ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
WEIGHT = "num-examples"
REFUSED = 100
"""Error code of a reply from a client that could not do its job, with the reason in plain words."""


def train_message(job: Mapping[str, Any], arrays: ArrayRecord, *, node: int, ttl_seconds: float | None) -> Message:
    """Return the message that asks node `node` to train.

    Args:
        job: JSON-like: all that the client needs to know beside the travelling tensors.
        arrays: The global travelling tensors; one record may be shared by all messages of a round.
        node: Flower's id of the node.
        ttl_seconds: How long the message may wait.
    """
    content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord({"job": json.dumps(job)})})
    return Message(
        content, dst_node_id=node, message_type=MessageType.TRAIN, ttl=ttl_seconds, group_id=str(job.get("round", ""))
    )


def read_job(message: Message) -> tuple[dict[str, Any], ArrayRecord]:
    """Return the job and the travelling tensors of a message made by `train_message`.

    Raises:
        UpdateRefused: If it is not such a message.
    """
    content = message.content
    try:
        return json.loads(str(content.config_records[CONFIG]["job"])), content.array_records[ARRAYS]
    except (KeyError, ValueError) as error:
        raise UpdateRefused(
            "a training message must hold 'config.job' as JSON and 'arrays'",
            f"it holds {sorted(content)}",
            "use one version of fedpeat on both ends",
        ) from error


def question(action: str, asked: Mapping[str, Any], *, node: int, arrays: ArrayRecord | None = None) -> Message:
    """Return the message that asks a device for something other than training.

    Args:
        action: Which handler of the client is to answer: `hello`, `bundle` or `begin`.
        asked: JSON-like.
        node: Flower's id of the node.
        arrays: Raw bytes beside it, from `raw_arrays`; one record may be shared by many messages.
    """
    content = RecordDict({CONFIG: ConfigRecord({"asked": json.dumps(asked)})})
    if arrays is not None:
        content[ARRAYS] = arrays
    return Message(content, dst_node_id=node, message_type=f"{MessageType.QUERY}.{action}", group_id=action)


def raw_arrays(data: bytes) -> ArrayRecord:
    """Return raw bytes as a Flower record."""
    return to_arrays({"data": torch.frombuffer(bytearray(data), dtype=torch.uint8)} if data else {})


def read_question(message: Message) -> tuple[dict[str, Any], bytes]:
    """Return what is asked by a message made by `question`, and the bytes beside it.

    Raises:
        UpdateRefused: If it is not such a message.
    """
    content = message.content
    try:
        asked = json.loads(str(content.config_records[CONFIG]["asked"]))
        tensors = read_arrays(content.array_records[ARRAYS]) if ARRAYS in content.array_records else {}
        data = tensors["data"].numpy().tobytes() if tensors else b""
    except (KeyError, ValueError, RecursionError) as error:
        raise UpdateRefused(
            "a question must hold 'config.asked' as JSON",
            f"it holds {sorted(content)}",
            "use one version of fedpeat on both ends",
        ) from error
    return asked, data


def answer_reply(answer: Mapping[str, Any], *, to: Message) -> Message:
    """Return the reply that carries an answer."""
    return Message(RecordDict({CONFIG: ConfigRecord({"answer": json.dumps(answer)})}), reply_to=to)


def read_answer(reply: Message) -> dict[str, Any]:
    """Return the answer in a reply made by `answer_reply`.

    Raises:
        UpdateRefused: If there is none.
    """
    try:
        answer = json.loads(str(reply.content.config_records[CONFIG]["answer"]))
    except (KeyError, ValueError, RecursionError) as error:
        raise UpdateRefused(
            "an answer must hold 'config.answer' as JSON", str(error), "use one version of fedpeat on both ends"
        ) from error
    if not isinstance(answer, dict):
        raise UpdateRefused("an answer must be a mapping", type(answer).__name__, "use one version of fedpeat")
    return answer


def update_reply(update: ClientUpdate, *, to: Message) -> Message:
    """Return the reply that carries `update` to the sender of `to`."""
    metrics = {name: float(value) for name, value in update.metrics.items()}
    content = RecordDict(
        {
            ARRAYS: to_arrays({**update.delta, **with_prefix(EXTRA, update.extras)}),
            METRICS: MetricRecord({**metrics, WEIGHT: float(update.weight)}),
            CONFIG: ConfigRecord(
                {
                    "client": update.client,
                    "round": update.round,
                    "bundle": update.bundle,
                    "encoding": json.dumps(dict(update.encoding)),
                }
            ),
        }
    )
    return Message(content, reply_to=to)


def error_reply(reason: str, *, to: Message) -> Message:
    """Return the reply of a client that could not do its job."""
    return Message(Error(code=REFUSED, reason=reason), reply_to=to)


def read_update(reply: Message) -> ClientUpdate:
    """Return the update in a reply, its delta still encoded.

    Raises:
        UpdateRefused: If a part is missing or the weight is not a finite number of at least 0.
    """
    content = reply.content
    try:
        metrics = {name: float(value) for name, value in content.metric_records[METRICS].items()}  # type: ignore[arg-type]
        weight = metrics.pop(WEIGHT)
        who = content.config_records[CONFIG]
        client, server_round, delta = str(who["client"]), int(who["round"]), content.array_records[ARRAYS]  # type: ignore[arg-type]
        encoding, bundle = json.loads(str(who["encoding"])), str(who.get("bundle", ""))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UpdateRefused(
            "an update must hold 'arrays', 'metrics' with a weight, and who sent it",
            f"it holds {sorted(content)} ({error})",
            "use one version of fedpeat on both ends",
        ) from error
    if not math.isfinite(weight) or weight < 0:
        raise UpdateRefused(f"the weight of {client!r} must be at least 0", f"it is {weight}", "look at its data")
    tensors = read_arrays(delta)
    return ClientUpdate(
        client=client,
        round=server_round,
        delta={name: tensor for name, tensor in tensors.items() if not name.startswith(EXTRA)},
        weight=weight,
        metrics=metrics,
        extras=without_prefix(EXTRA, tensors),
        encoding=encoding if isinstance(encoding, dict) else {},
        payload_bytes=count_bytes(tensors),
        bundle=bundle,
    )


def read_failure(reply: Message, *, client: str, server_round: int) -> ClientFailure:
    """Return why `client` failed, from an error reply of ours or of Flower's.

    Flower wraps a client's exception in a long coloured traceback; only its last line says something.
    """
    reason = re.sub(r"\x1b\[[0-9;]*m", "", reply.error.reason or "no reason given").strip()
    died = "ActorDied" in reason or "ActorUnavailable" in reason or "WorkerCrashed" in reason
    said = next((kind for kind in ("timeout", "surplus") if kind in reason[:40]), "error")
    kind = "died" if died else said
    last = next((line.strip() for line in reversed(reason.splitlines()) if line.strip(" '>")), reason)
    return ClientFailure(client=client, round=server_round, kind=kind, reason=(reason if died else last)[:500])
