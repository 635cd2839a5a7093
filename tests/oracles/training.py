"""Local training as a plain loop: slow, obvious, independent of the client package.

It knows neither rounds nor canonical names: the whole order of rows is written out first, then walked through.
"""

import hashlib
import math

import torch


def seed(run_seed, purpose, *parts):
    text = "\x1f".join([str(run_seed), purpose, *map(str, parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def row_order(rows, wanted, *, run_seed, client):
    """The first `wanted` row numbers of a client's stream: one permutation after the other."""
    order, epoch = [], 0
    while len(order) < wanted:
        generator = torch.Generator().manual_seed(seed(run_seed, "order", client, epoch))
        order += torch.randperm(rows, generator=generator).tolist()
        epoch += 1
    return order[:wanted]


def rate_at(step, *, peak, schedule, warmup, total):
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * done)) / 2
    return peak


def train_loop(
    model,
    parameters,
    rows,
    *,
    optimizer,
    steps,
    batch_size,
    run_seed,
    client,
    rate=None,
    clip_norm=None,
    mu=0.0,
):
    """Take `steps` steps in place; returns the losses. `rate` gives the learning rate of a step, if it changes."""
    order = row_order(len(rows), steps * batch_size, run_seed=run_seed, client=client)
    start = [parameter.detach().clone() for parameter in parameters]
    losses = []
    model.train()
    for step in range(steps):
        torch.manual_seed(seed(run_seed, "dropout", client, step))
        if rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
        batch = rows.batch(order[step * batch_size : (step + 1) * batch_size])
        optimizer.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        if mu:
            for parameter, anchor in zip(parameters, start, strict=True):
                parameter.grad += mu * (parameter.detach() - anchor)
        if clip_norm is not None:
            total = math.sqrt(sum(float(parameter.grad.double().square().sum()) for parameter in parameters))
            for parameter in parameters:
                parameter.grad *= min(1.0, clip_norm / (total + 1e-6))
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses
