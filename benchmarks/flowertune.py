"""A client in the shape of Flower's FlowerTune template: everything is loaded anew in every call.

As there, a call loads the model from its folder, wraps it with HF peft, loads the PEFT state dict that was sent,
trains, and sends `get_peft_model_state_dict` back to stock FedAvg. The training loop itself is a plain one, which is
kinder to the template than its own (a trainer object built in every call).
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from fedpeat.data import open_rows

app = ClientApp()


def load(job: dict[str, Any]) -> Any:
    """Return the model with LoRA in the adapter's blocks, as FlowerTune's `get_model` does."""
    config = LoraConfig(
        r=job["rank"],
        lora_alpha=job["alpha"],
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        layers_to_transform=job["adapter_positions"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(AutoModelForCausalLM.from_pretrained(job["model"]), config)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Load, train, send the PEFT state dict."""
    torch.set_num_threads(1)
    job = json.loads(str(message.content.config_records["config"]["job"]))
    model = load(job)
    set_peft_model_state_dict(model, message.content.array_records["arrays"].to_torch_state_dict())
    rows = open_rows(Path(job["data"]), job["clients"][int(context.node_config["partition-id"])], "train")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=job["learning_rate"])
    model.train()
    losses = []
    for step in range(job["local_steps"]):
        start = step * job["batch_size"]
        batch = rows.batch([(start + offset) % len(rows) for offset in range(job["batch_size"])])
        optimizer.zero_grad(set_to_none=True)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job["clip_norm"])
        optimizer.step()
        losses.append(float(loss))
    metrics = MetricRecord({"train_loss": sum(losses) / len(losses), "num-examples": float(len(rows))})
    content = RecordDict({"arrays": ArrayRecord(get_peft_model_state_dict(model)), "metrics": metrics})
    return Message(content, reply_to=message)


def run(
    job: dict[str, Any], *, rounds: int, workers: int, between: Callable[[], float]
) -> tuple[Sequence[float], Sequence[float]]:
    """Run stock FedAvg; return each round's seconds and what `between` returned after each round.

    `between` is called outside the rounds' time.
    """
    from flwr.simulation import run_simulation

    seconds: list[float] = []
    others: list[float] = []
    clock = [0.0]
    server_app = ServerApp()

    def after(server_round: int, _arrays: ArrayRecord) -> None:
        if server_round:
            seconds.append(time.perf_counter() - clock[0])
            others.append(between())
        clock[0] = time.perf_counter()

    @server_app.main()
    def main(grid: Grid, _context: Context) -> None:
        count = len(job["clients"])
        initial = ArrayRecord(get_peft_model_state_dict(load(job)))
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count)
        config = ConfigRecord({"job": json.dumps(job)})
        strategy.start(grid, initial, num_rounds=rounds, train_config=config, evaluate_fn=after)

    run_simulation(
        server_app,
        app,
        num_supernodes=len(job["clients"]),
        backend_config={"init_args": {"num_cpus": workers}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    return seconds, others
