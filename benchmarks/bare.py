"""The limit: the same model, rows, batches and steps in a plain PyTorch loop, with nothing around it."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedpeat.bundles import build_emulated, open_bundle
from fedpeat.client.batches import batch_indices
from fedpeat.data import open_rows
from fedpeat.peft import attach

Block = Callable[[Sequence[str], int], float]


def bare_loop(job: Mapping[str, Any], *, local_steps: int) -> Block:
    """Return `block(clients, start_step)`: it takes `local_steps` steps on each one's rows and returns the seconds.

    Everything is loaded before; there is one optimiser, no message, no delta and no metric.
    """
    torch.set_num_threads(1)
    spec = job["spec"]
    view = build_emulated(open_bundle(job["bundle"], verify=False))
    tuned = attach(
        view.model,
        method=job["method"],
        path=view.path,
        sources=view.sources,
        adapter_positions=view.adapter_positions,
        seed=job["seed"],
    )
    optimizer = torch.optim.AdamW(tuned.parameters, lr=spec["learning_rate"])
    rows: dict[str, Any] = {}

    def block(clients: Sequence[str], start_step: int) -> float:
        for client in clients:
            if client not in rows:
                rows[client] = open_rows(Path(job["data"]), client, "train")
        order = {
            client: list(
                batch_indices(
                    len(rows[client]),
                    batch_size=spec["batch_size"],
                    start=start_step,
                    count=local_steps,
                    seed=job["seed"],
                    client=client,
                )
            )
            for client in clients
        }
        tuned.model.train()
        begin = time.perf_counter()
        for client in clients:
            for indices in order[client]:
                optimizer.zero_grad(set_to_none=True)
                tuned.model(**rows[client].batch(indices), use_cache=False).loss.backward()
                torch.nn.utils.clip_grad_norm_(tuned.parameters, spec["clip_norm"])
                optimizer.step()
        return time.perf_counter() - begin

    return block
