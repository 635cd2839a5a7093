"""Keeping a federation's emulator in step with its adapter: settings, and the call of a round."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedpeat.client.app import view_of
from fedpeat.core import ConfigError, GlobalState, Tensors, count_bytes
from fedpeat.emulators import BuildContext, EmulatorLora, Pace, Realigner, Weights
from fedpeat.peft import Tuned
from simulations.unfreezing import Unfreezing


@dataclass(frozen=True)
class Realignment:
    """Re-alignment of the one emulator of a run.

    Attributes:
        every: Rounds between re-alignments; the first comes before round 1 + `every`.
        realigner: What does it.
        full: The full model with its PEFT parameters.
        emulated: The emulated one.
    """

    every: int
    realigner: Realigner
    full: Tuned
    emulated: Tuned

    def __call__(
        self, server_round: int, shared: GlobalState, so_far: Tensors, *, asked: bool | None = None
    ) -> Tensors:
        """Return the emulator's changes for a round: new ones where it is due, else those `so_far`.

        Args:
            server_round: Counted from 1.
            shared: What the federation has learnt.
            so_far: The changes up to now.
            asked: Whether the round's plan asks for it; None for every so many rounds.
        """
        due = server_round > 1 and (server_round - 1) % self.every == 0 if asked is None else asked
        if not due:
            return so_far
        Unfreezing().plug_in(self.full, shared)
        Unfreezing().plug_in(self.emulated, shared)
        return self.realigner(so_far or None, round_number=server_round).tensors

    @property
    def payload_bytes(self) -> int:
        """Size of the changes, bytes: that of the factors by shape, so it is known before there are any."""
        return count_bytes(self.realigner.start())

    def apply(self, changes: Tensors) -> None:
        """Give the server's emulated model these changes."""
        self.realigner.lora.apply(changes)


def realignment_of(
    settings: Mapping[str, Any], context: BuildContext, full: Tuned, emulated: Mapping[str, Tuned]
) -> Realignment | None:
    """Return the run's re-alignment, or None.

    Raises:
        ConfigError: If there is no emulator or several, no public text, or something else changes the emulator too.
    """
    realign = settings["realign"]
    if realign["every"] is None:
        return None
    asked = f"cannot use realign.every={realign['every']}"
    if realign["every"] < 1:
        raise ConfigError(asked, "it is a number of rounds", "set 1 or more, or null for never")
    if set(emulated) != {"default"}:
        found = "nothing of the middle was left out" if not emulated else "there are several"
        raise ConfigError(asked, f"it needs one emulator; {found}", "choose one emulator for all devices")
    if settings["client"]["unfreeze"] or full.prompt_tokens:
        found = "input prompts shift the tokens" if full.prompt_tokens else "client.unfreeze trains the emulator too"
        raise ConfigError(asked, found, "choose one of them")
    if settings["client"]["prefix_mib"]:
        raise ConfigError(asked, "client.prefix_mib keeps what an emulator that stays gives", "choose one of them")
    if context.rows is None:
        raise ConfigError(
            asked, "the server has no public text", "set data.public_share or data.server_share, e.g. 0.05"
        )
    realigner = Realigner(
        view_of(full),
        EmulatorLora(view_of(emulated["default"])),
        context.rows,
        rank=realign["rank"],
        pace=Pace(
            steps=realign["steps"],
            learning_rate=realign["learning_rate"],
            batch_size=realign["batch_size"],
            warmup=0,
            clip_norm=1.0,
        ),
        weights=Weights(realign["hidden_weight"], realign["lm_weight"], realign["logit_weight"]),
        seed=settings["seed"],
    )
    return Realignment(realign["every"], realigner, full, emulated["default"])
