"""Clients that do harm, for trials of robust rules in simulation."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fedpeat.core import ClientUpdate, ConfigError, nearest, seed_for
from fedpeat.data import Rows

KINDS = ("scale", "sign_flip", "gaussian", "nans", "shuffle_labels")
"""What an attacker sends: its delta times `factor`; the negative of it times `factor`; noise with `factor` times its
delta's standard deviation; not a number; or what honest training on shuffled labels gives."""

_UNSCORED = -100


def check_kind(kind: str) -> str:
    """Return `kind` if it is known.

    Raises:
        ConfigError: If it is not.
    """
    if kind not in KINDS:
        raise ConfigError(f"cannot attack by {kind!r}", "no such attack", nearest(kind, KINDS))
    return kind


def poisoned(rows: Rows, job: Mapping[str, Any], client: str) -> Rows:
    """Return the rows that a client trains on: its own, or under `shuffle_labels` with the scored labels permuted."""
    attack = job.get("attack")
    if not attack or attack["kind"] != "shuffle_labels":
        return rows
    labels = rows.labels.clone()
    scored = labels != _UNSCORED
    generator = torch.Generator().manual_seed(seed_for(job["seed"], "attack", client))
    values = labels[scored]
    labels[scored] = values[torch.randperm(len(values), generator=generator)]
    return Rows(rows.input_ids, labels, rows.attention_mask)


def attacked(update: ClientUpdate, job: Mapping[str, Any]) -> ClientUpdate:
    """Return what a client sends: its honest update, or what its job's attack makes of it.

    Raises:
        ConfigError: If the attack is unknown.
    """
    attack = job.get("attack")
    if not attack or check_kind(attack["kind"]) == "shuffle_labels":
        return update
    generator = torch.Generator().manual_seed(seed_for(job["seed"], "attack", update.client, update.round))
    factor = float(attack["factor"])

    def harm(tensor: torch.Tensor) -> torch.Tensor:
        if attack["kind"] == "gaussian":
            spread = float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0
            return factor * spread * torch.randn(tensor.shape, generator=generator)
        if attack["kind"] == "nans":
            return torch.full_like(tensor, torch.nan)
        return tensor * (factor if attack["kind"] == "scale" else -factor)

    delta = {name: harm(update.delta[name]) for name in sorted(update.delta)}
    return replace(update, delta=delta, extras={name: harm(update.extras[name]) for name in sorted(update.extras)})
