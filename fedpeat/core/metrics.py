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
        "choice_accuracy",
        "share",
        "fedpeat.server",
        "up",
        "Held-out documents whose right answer the model finds the likeliest of `data.choices`, 0 to 1, for the same"
        " models but `personal`; only where the data has choices.",
    ),
    Metric(
        "privacy_margin",
        "nats/token",
        "fedpeat.server",
        "up",
        "Emulated-and-tuned minus plug-in loss: what a device lacks by not holding the full model.",
    ),
    Metric(
        "privacy_margin_accuracy",
        "share",
        "fedpeat.server",
        "up",
        "Plug-in minus emulated-and-tuned choice accuracy: the same in right answers.",
    ),
    Metric(
        "extraction_margin",
        "nats/token",
        "simulations",
        "up",
        "Loss of what one curious client makes of its bundle by fine-tuning all of it (`baselines.extraction`), minus"
        " plug-in loss; only where that baseline was run.",
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
        "emulator.zero_shot_ratio",
        "1",
        "simulations",
        "",
        "The emulator's perplexity before tuning over the full model's: at 1 a device has what the full model is worth;"
        " the larger, the less it is given, and the worse a guide the emulator is to tune the adapter on.",
    ),
    Metric(
        "emulator.emulator_parameters",
        "parameters",
        "simulations",
        "down",
        "Parameters of the emulator's blocks; shared blocks once, layers stored in few bits or sparsely by the matrix"
        " that they stand for.",
    ),
    Metric("emulator.middle_parameters", "parameters", "simulations", "", "Parameters of the blocks it stands in for."),
    Metric("emulator.kept_share", "share", "simulations", "down", "The former over the latter; null without a middle."),
    Metric("emulator.bundle_bytes", "bytes", "fedpeat.bundles", "down", "Tensors that a device fetches once."),
    Metric("emulator.full_bytes", "bytes", "simulations", "", "What the full model's tensors would be, sent likewise."),
    Metric(
        "emulator.client_memory_bytes",
        "bytes",
        "fedpeat.client",
        "down",
        "Memory of local training on the emulated model: weights as stored, gradients, the optimiser's state, and what"
        " autograd keeps of one forward pass of `client.batch_size` rows; `client_memory` has the four. Counted, not"
        " sampled: what kernels need for a moment is not in it. Only with `evaluation.costs=true`.",
    ),
    Metric(
        "emulator.full_memory_bytes",
        "bytes",
        "fedpeat.client",
        "",
        "The same on the full model with the same PEFT; `full_memory` has its parts.",
    ),
    Metric(
        "emulator.step_seconds",
        "s",
        "fedpeat.client",
        "down",
        "Median of three local training steps on the emulated model, not compiled, on the server's machine before"
        " round 1; only with `evaluation.costs=true`.",
    ),
    Metric("emulator.full_step_seconds", "s", "fedpeat.client", "", "The same on the full model."),
    Metric(
        "bytes_bundle",
        "bytes",
        "fedpeat.bundles",
        "down",
        "Size of a bundle's tensors: what each device fetches once.",
    ),
    Metric("seconds.total", "s", "simulations", "down", "Wall time of the round or run."),
    Metric(
        "seconds.train", "s", "simulations", "down", "Wall time from the first message sent to the last reply folded."
    ),
    Metric(
        "seconds.evaluate",
        "s",
        "simulations",
        "down",
        "Wall time of the server's evaluations, and of re-aligning the emulator.",
    ),
    Metric("seconds.wire", "s", "simulations", "down", "Time spent turning values into records and back."),
    Metric("seconds.overhead", "s", "simulations", "down", "What remains of the total."),
    Metric(
        "tokens_per_second", "tokens/s", "simulations", "up", "Trained tokens of all participants over seconds.train."
    ),
    Metric(
        "state_lost",
        "1",
        "fedpeat.client",
        "",
        "1 for a client that no longer has what it kept on its disk for the recipe or codec, and began it anew.",
    ),
    Metric(
        "simulated_seconds",
        "s",
        "fedpeat.devices",
        "down",
        "The clock of simulated time after the round; only with a model of devices (`devices=mixed`, ...).",
    ),
    Metric(
        "devices.seconds",
        "s",
        "fedpeat.devices",
        "down",
        "Simulated time of the whole run; `devices.milestones` says when the plug-in model had come which `share` of"
        " the way to its best loss, in simulated and in measured seconds of the rounds; `devices.status` counts"
        " visits.",
    ),
    Metric("devices.joules", "J", "fedpeat.devices", "down", "Modelled energy of all devices and rounds."),
    Metric("devices.bundle_bytes", "bytes", "fedpeat.devices", "down", "Modelled fetches of bundles, all devices."),
    Metric("surplus", "clients", "simulations", "", "Clients asked but not waited for (`round.over_select`)."),
    Metric("weights_cut", "clients", "strategies", "", "Clients whose weight was cut to `round.max_weight_share`."),
    Metric("update_norm", "1", "strategies", "", "Euclidean norm of the step taken by the global state."),
    Metric(
        "aggregation_error",
        "1",
        "strategies",
        "down",
        "On LoRA: how far the step taken is from the weighted mean of the clients' products, over that mean's size;"
        " only with `evaluation.exactness=true`.",
    ),
    Metric(
        "epsilon",
        "1",
        "fedpeat.privacy",
        "down",
        "What the shared tensors may tell of a client after all rounds so far, at `privacy.delta`; only with"
        " `privacy=client_level`.",
    ),
    Metric(
        "clip_norm",
        "1",
        "strategies",
        "",
        "Largest norm of a client's delta in the round; only with `privacy=client_level`.",
    ),
    Metric(
        "clipped_share",
        "1",
        "strategies",
        "",
        "Share of the round's clients whose delta was clipped: exact, and so not private itself; only with"
        " `privacy=client_level`.",
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
