"""Every number a run reports: its unit, who computes it, and which way is better."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A reported number.

    Attributes:
        name: As it stands in `metrics.jsonl` and `summary.json`.
        unit: "nats/token", "bytes", "s", "1" for a ratio, ...
        where: The room that computes it.
        better: "down", "up", or "" where neither is better.
        meaning: One sentence.
    """

    name: str
    unit: str
    where: str
    better: Literal["down", "up", ""]
    meaning: str


_MODELS = (
    "for each of `full_zero_shot`, `emulator_zero_shot`, `emulator_tuned`, `plug_in`; and `personal`, each client's own"
    " model on its own text, where a recipe has clients keep tensors"
)

METRICS: tuple[Metric, ...] = (
    Metric("loss", "nats/token", "fedpeat.server", "down", f"Mean cross-entropy on held-out text, {_MODELS}."),
    Metric("perplexity", "1", "fedpeat.server", "down", "exp(loss)."),
    Metric("accuracy", "share", "fedpeat.server", "up", "Next tokens predicted exactly, 0 to 1."),
    Metric("tokens", "tokens", "fedpeat.server", "", "Held-out tokens scored."),
    Metric(
        "privacy_margin",
        "nats/token",
        "fedpeat.server",
        "up",
        "Emulated-and-tuned minus plug-in loss: what a device lacks by not holding the full model.",
    ),
    Metric(
        "transfer_gap",
        "nats/token",
        "fedpeat.server",
        "down",
        "Plug-in minus whole-model PEFT loss; only where that baseline was run.",
    ),
    Metric("weight", "1", "fedpeat.client", "", "A participant's share before normalising."),
    Metric("train_loss", "nats/token", "fedpeat.client", "down", "Mean loss over the local steps of a round."),
    Metric("train_loss_first", "nats/token", "fedpeat.client", "down", "Loss of the first local step of a round."),
    Metric("train_loss_last", "nats/token", "fedpeat.client", "down", "Loss of the last local step of a round."),
    Metric("train_examples", "rows", "fedpeat.client", "", "Rows read in local training, repeats included."),
    Metric("client_seconds", "s", "fedpeat.client", "down", "A client's whole visit: model, data, training, disk."),
    Metric("train_tokens", "tokens", "fedpeat.client", "", "Tokens read in local training, padding included."),
    Metric("train_seconds", "s", "fedpeat.client", "down", "Time in the local steps alone."),
    Metric("train_rows", "rows", "fedpeat.client", "", "Training rows the client holds."),
    Metric("delta_norm", "1", "fedpeat.client", "", "Euclidean norm of a participant's delta."),
    Metric("bytes_down", "bytes", "fedpeat.wire", "down", "Tensor payload sent to clients."),
    Metric("bytes_up", "bytes", "fedpeat.wire", "down", "Tensor payload received from clients."),
    Metric(
        "bytes_bundle",
        "bytes",
        "fedpeat.emulators",
        "down",
        "Size of a bundle's tensors: what each device fetches once.",
    ),
    Metric("seconds.total", "s", "simulations", "down", "Wall time of the round or run."),
    Metric(
        "seconds.train", "s", "simulations", "down", "Wall time from the first message sent to the last reply folded."
    ),
    Metric("seconds.evaluate", "s", "simulations", "down", "Wall time of the server's evaluations."),
    Metric("seconds.wire", "s", "simulations", "down", "Time spent turning values into records and back."),
    Metric("seconds.overhead", "s", "simulations", "down", "What remains of the total."),
    Metric(
        "tokens_per_second", "tokens/s", "simulations", "up", "Trained tokens of all participants over seconds.train."
    ),
    Metric("update_norm", "1", "strategies", "", "Euclidean norm of the step taken by the global state."),
    Metric(
        "aggregation_error",
        "1",
        "strategies",
        "down",
        "On LoRA: how far the step taken is from the weighted mean of the clients' products, over that mean's size;"
        " only with `evaluation.exactness=true`.",
    ),
    Metric("peak_rss_mib", "MiB", "fedpeat.core", "down", "Largest resident memory of a process so far."),
    Metric("peak_gpu_mib", "MiB", "fedpeat.core", "down", "Largest GPU memory allocated; only on a GPU."),
    Metric(
        "clients_failed",
        "clients",
        "simulations",
        "down",
        "Client visits that did not count: errors, timeouts, refusals.",
    ),
)
