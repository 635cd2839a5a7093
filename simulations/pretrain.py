"""`fedpeat pretrain`: make the embedded model anew, from docstrings of installed libraries, by conf/pretrain.yaml."""

import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn
from transformers import LlamaForCausalLM

from fedpeat.core import (
    ConfigError,
    DataError,
    content_hash,
    read_json,
    read_tensors,
    seed_for,
    write_json,
    write_tensors,
)
from simulations.corpora import pack, read_corpora, train_tokenizer
from simulations.foundation import build_model, evaluate, only_blocks
from simulations.model_card import machine, write_card

_NOT_OF_THE_RESULT = ("output", "cache", "compile", "threads", "log_every", "checkpoint_every", "evaluation", "workers")


def pretrain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train a tokenizer and a model, evaluate them, and write both with a model card to `settings["output"]`.

    Interrupted, it goes on from its last checkpoint in `<output>.partial` when called again with the same recipe.

    Args:
        settings: The keys of conf/pretrain.yaml.

    Returns:
        What the card tells: data, recipe, time, and the losses of model and baselines on held-out modules.

    Raises:
        ConfigError: If the recipe contradicts itself.
        DataError: If a library is not installed, or there is too little text.
    """
    _check(settings)
    output = Path(settings["output"])
    partial = output.with_name(f"{output.name}.partial") / _recipe_hash(settings)
    corpora = read_corpora(settings)
    context = settings["shape"]["max_position_embeddings"]
    tokenizer = train_tokenizer(corpora["train"], vocabulary=settings["vocabulary"], context=context)
    rows = pack(tokenizer, corpora["train"], row_tokens=settings["row_tokens"])
    if not len(rows):
        found = f"{sum(corpora['libraries'].values())} characters of training text"
        raise DataError(f"cannot fill one row of {settings['row_tokens']} tokens", found, "name more libraries")
    write_tensors(partial / "rows.safetensors", {"rows": rows})
    tokenizer.save_pretrained(partial / "tokenizer")
    if settings["workers"] > 1:
        (partial / "meeting").unlink(missing_ok=True)  # of an interrupted run: workers would wait for its dead ones
        spawn(_work, args=(dict(settings), str(partial)), nprocs=settings["workers"])
    else:
        _work(0, settings, str(partial))
    model = build_model(settings)
    state = _resume(partial, model, None)
    model.to(getattr(torch, settings["storage"]))
    finished = output.with_name(f".{output.name}.new")
    model.save_pretrained(finished)
    tokenizer.save_pretrained(finished)
    report = {
        "recipe": dict(settings),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "characters": corpora["libraries"],
        "rows": len(rows),
        "tokens_seen": settings["steps"] * settings["batch_size"] * settings["row_tokens"],
        "training_seconds": state["seconds"],
        "machine": machine(),
        "evaluation": evaluate(settings, model.float(), tokenizer, train=rows, corpora=corpora),
    }
    write_card(finished, report)
    shutil.rmtree(output, ignore_errors=True)
    finished.rename(output)
    write_json(partial / "report.json", report)
    return report


def _check(settings: Mapping[str, Any]) -> None:
    skip, depth = settings["skip"], settings["shape"]["num_hidden_layers"]
    if skip["share"] and not 0 <= skip["first"] <= skip["last"] < depth:
        found = f"the model has blocks 0..{depth - 1}"
        raise ConfigError(f"cannot skip blocks {skip['first']}..{skip['last']}", found, "set skip.first and skip.last")
    middle = skip["last"] - skip["first"] + 1
    if skip["share"] and not 0 <= skip["fewest"] <= skip["most"] <= middle:
        asked = f"cannot run {skip['fewest']}..{skip['most']} blocks of the middle"
        raise ConfigError(asked, f"it has {middle}", "set skip.fewest and skip.most")
    if settings["batch_size"] % settings["workers"]:
        asked = f"cannot share {settings['batch_size']} rows among {settings['workers']} workers"
        raise ConfigError(asked, "the shares would differ", "let workers divide batch_size")


def _recipe_hash(settings: Mapping[str, Any]) -> str:
    return content_hash({key: value for key, value in settings.items() if key not in _NOT_OF_THE_RESULT})


def _work(rank: int, settings: Mapping[str, Any], folder: str) -> None:
    """Train in one process; all of them hold the same weights after every step."""
    partial, workers = Path(folder), settings["workers"]
    torch.set_num_threads(settings["threads"])
    if workers > 1:
        meeting = f"file://{(partial / 'meeting').resolve()}"
        distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=workers)
    model = build_model(settings).train()
    optimizer = _optimizer(settings, model)
    state = _resume(partial, model, optimizer)
    if settings["compile"]:
        for block in model.model.layers:
            block.compile(dynamic=False)
    rows = read_tensors(partial / "rows.safetensors")["rows"]
    with _progress(settings, state["step"]) if rank == 0 else nullcontext(lambda *_: None) as tell:
        _train(settings, model, optimizer, rows=rows, rank=rank, state=state, partial=partial, tell=tell)
    if workers > 1:
        distributed.destroy_process_group()


def _optimizer(settings: Mapping[str, Any], model: nn.Module) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    groups = [
        {"params": [item for item in parameters if item.ndim > 1], "weight_decay": settings["weight_decay"]},
        {"params": [item for item in parameters if item.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings["learning_rate"], betas=tuple(settings["betas"]))


def _train(
    settings: Mapping[str, Any],
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    *,
    rows: torch.Tensor,
    rank: int,
    state: Mapping[str, Any],
    partial: Path,
    tell: Callable[[int, torch.Tensor], None],
) -> None:
    workers, share = settings["workers"], settings["batch_size"] // settings["workers"]
    parameters, began = list(model.parameters()), time.perf_counter() - state["seconds"]
    for step in range(state["step"], settings["steps"]):
        batch = rows[batch_indices(settings, len(rows), step)][rank * share : (rank + 1) * share].long()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        with only_blocks(model, kept_in_step(settings, step)):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
        gradients = [item.grad for item in parameters if item.grad is not None]  # none in skipped blocks
        if workers > 1:
            _average(gradients, workers)
        nn.utils.clip_grad_norm_(parameters, settings["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        tell(done, loss)
        if rank == 0 and (done % settings["checkpoint_every"] == 0 or done == settings["steps"]):
            _checkpoint(partial, model, optimizer, {"step": done, "seconds": time.perf_counter() - began})


def _average(gradients: list[torch.Tensor], workers: int) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    for gradient, part in zip(gradients, (flat / workers).split([item.numel() for item in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def batch_indices(settings: Mapping[str, Any], count: int, step: int) -> list[int]:
    """Return the rows of a step: each epoch goes through all rows, in an order of its own."""
    size, indices = settings["batch_size"], []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, count)
        indices.append(_order(settings["seed"], count, epoch)[place])
    return indices


_ORDERS: dict[tuple[int, int, int], list[int]] = {}


def _order(seed: int, count: int, epoch: int) -> list[int]:
    key = (seed, count, epoch)
    if key not in _ORDERS:
        generator = torch.Generator().manual_seed(seed_for(seed, "epoch", epoch))
        _ORDERS.clear()
        _ORDERS[key] = torch.randperm(count, generator=generator).tolist()
    return _ORDERS[key]


def learning_rate(settings: Mapping[str, Any], step: int) -> float:
    """Return the learning rate of a step: linear warm-up, the peak, then a cosine down to `final_share` of it.

    Until the decay begins nothing depends on `steps`.
    """
    peak, final, decay = settings["learning_rate"], settings["final_share"], settings["decay_steps"]
    warm = min(1.0, (step + 1) / settings["warmup_steps"])
    progress = max(0.0, (step - (settings["steps"] - decay)) / decay)
    return peak * warm * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)


def kept_in_step(settings: Mapping[str, Any], step: int) -> list[int]:
    """Return the blocks that run in a training step: mostly all, in a share of the steps not all of the middle."""
    skip, depth = settings["skip"], settings["shape"]["num_hidden_layers"]
    draw = random.Random(seed_for(settings["seed"], "skip", step))
    if draw.random() >= skip["share"]:
        return list(range(depth))
    middle = range(skip["first"], skip["last"] + 1)
    kept = draw.sample(middle, draw.randint(skip["fewest"], skip["most"]))
    return sorted(set(range(depth)) - set(middle) | set(kept))


@contextmanager
def _progress(settings: Mapping[str, Any], start: int) -> Iterator[Callable[[int, torch.Tensor], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, began, size = Console(), time.perf_counter(), settings["batch_size"] * settings["row_tokens"]
    bar = Progress(
        "pretraining", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[last]}")
    )
    task = bar.add_task("", total=settings["steps"], completed=start, last="")
    recent: list[float] = []

    def tell(done: int, loss: torch.Tensor) -> None:
        recent.append(loss.item())
        if done % settings["log_every"] == 0 or done == settings["steps"]:
            speed = (done - start) * size / (time.perf_counter() - began)
            last = f"loss {sum(recent) / len(recent):.3f}, {speed:,.0f} tokens/s"
            recent.clear()
            if console.is_terminal:
                bar.update(task, completed=done, last=last)
            else:
                print(f"step {done}/{settings['steps']}: {last}, {time.perf_counter() - began:.0f} s", flush=True)

    with bar if console.is_terminal else nullcontext():
        yield tell


def _checkpoint(partial: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    tensors = {f"model.{name}": value for name, value in model.named_parameters()}
    names = {id(value): name for name, value in model.named_parameters()}
    for parameter, moments in optimizer.state.items():
        tensors |= {f"{kind}.{names[id(parameter)]}": value for kind, value in moments.items()}
    write_tensors(partial / f"step-{state['step']}.safetensors", tensors)
    write_json(partial / "state.json", state)
    for path in partial.glob("step-*.safetensors"):
        if path.stem != f"step-{state['step']}":
            path.unlink()


def _resume(partial: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    if not (partial / "state.json").is_file():
        return {"step": 0, "seconds": 0.0}
    state = read_json(partial / "state.json")
    tensors = read_tensors(partial / f"step-{state['step']}.safetensors")
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"model.{name}"])
        if optimizer is not None and f"step.{name}" in tensors:
            kinds = ("step", "exp_avg", "exp_avg_sq")
            optimizer.state[parameter] = {kind: tensors[f"{kind}.{name}"].clone() for kind in kinds}
    return state
