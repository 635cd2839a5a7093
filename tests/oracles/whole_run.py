"""A whole run as plain loops over Hugging Face models: slow, obvious, independent of the packages under test.

It knows the words of the run (clients, rounds, adapter blocks) but reads its own text, cuts the full model itself,
and averages with `fed_avg`.
"""

import contextlib
import json
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from tests.miniatures import VOCABULARY
from tests.oracles.fed_avg import weighted_average
from tests.oracles.training import row_order, seed

END = VOCABULARY.index("</s>")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "c_attn", "c_proj", "c_fc")


def read_rows(path, block_size, author=None):
    """The text of an author (or all) as rows `(rows, block_size)`: a token a character, each document ended."""
    documents = [json.loads(line) for line in Path(path).read_text().splitlines()]
    chosen = [document["text"] for document in documents if author is None or document["author"] == author]
    stream = [token for text in chosen for token in [*map(VOCABULARY.index, text), END]]
    whole = len(stream) // block_size
    return torch.tensor(stream[: whole * block_size]).view(whole, block_size)


def load(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False).eval()


def place_of_blocks(model):
    """Where the blocks are: the parent module, the attribute, the full name."""
    if hasattr(model, "transformer"):
        return model.transformer, "h", "transformer.h"
    return model.model, "layers", "model.layers"


def set_up(folder, *, adapter, kept, rank=None, alpha=16, dropout=0.0):
    """A device's model and its trainable tensors, by their names in the full model.

    Args:
        folder: The full model's.
        adapter: Indices of the adapter blocks.
        kept: Indices of the middle's blocks that stay.
        rank: Of LoRA on all linear layers of the adapter blocks; None to train these blocks' own weights.
        alpha: LoRA's.
        dropout: LoRA's.
    """
    model = load(folder)
    parent, attribute, path = place_of_blocks(model)
    blocks = getattr(parent, attribute)
    names = [f"{path}.{index}." for index in adapter]
    if rank is not None:
        targets = [
            name
            for name, module in model.named_modules()
            if name.startswith(tuple(names)) and name.rsplit(".", 1)[-1] in LINEAR
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_peft_model(
                model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none")
            )
    chosen = {
        name.replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if name.startswith(tuple(names)) and (rank is None or "lora_" in name)
    }
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    setattr(parent, attribute, nn.ModuleList([blocks[index] for index in sorted([*adapter, *kept])]))
    return model.eval(), chosen  # layers that peft adds are in training mode


def write(parameters, tensors):
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def read(parameters):
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@contextlib.contextmanager
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(before)


def train(model, parameters, rows, optimizer, *, first, steps, batch_size, client, run_seed=0, clip_norm=1.0):
    """Take `steps` optimiser steps, of which the first is the client's step number `first` in its whole life."""
    order = row_order(len(rows), (first + steps) * batch_size, run_seed=run_seed, client=client)
    model.train()
    with one_thread():
        for step in range(first, first + steps):
            torch.manual_seed(seed(run_seed, "dropout", client, step))
            batch = rows[order[step * batch_size : (step + 1) * batch_size]]
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            nn.utils.clip_grad_norm_(list(parameters.values()), clip_norm)
            optimizer.step()
    model.eval()


def federate(model, parameters, start, rows_of, *, rounds, steps, pace, batch_size, make_optimizer):
    """Federated averaging by tokens: every client in every round, each with a fresh optimiser.

    Args:
        model: A device's.
        parameters: Its trainable tensors.
        start: What they are before the first round.
        rows_of: Rows by client.
        rounds: How many.
        steps: Of each client in a round.
        pace: Steps by which the federation moves on in a round, and every client's stream of rows with it.
        batch_size: Rows of a step.
        make_optimizer: Of a list of tensors.
    """
    current = start
    for number in range(rounds):
        deltas, weights = [], []
        for client, rows in sorted(rows_of.items()):
            write(parameters, current)
            optimizer, count = make_optimizer(list(parameters.values())), steps[client]
            place = {"first": number * pace, "steps": count, "batch_size": batch_size, "client": client}
            train(model, parameters, rows, optimizer, **place)
            deltas.append({name: (tensor - current[name]).numpy() for name, tensor in read(parameters).items()})
            weights.append(count * batch_size * rows.shape[1])
        mean = weighted_average(deltas, weights)
        current = {name: tensor + torch.from_numpy(mean[name]) for name, tensor in current.items()}
    return current


@torch.no_grad()
def loss_of(model, rows):
    """Mean loss of every token but each row's first, summed in fp64."""
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    each = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    return float(each.double().mean())


def largest_difference(left, right):
    assert set(left) == set(right), sorted(set(left) ^ set(right))
    return max(float((left[name] - right[name]).abs().max()) for name in left)
