"""Emulator tensors that devices train, and what becomes of what they learnt: a policy."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedpeat.core import ConfigError, GlobalState, Tensors, nearest
from fedpeat.peft import Tuned
from strategies import Recipe

POLICIES = ("local", "discard", "map_back")


@dataclass(frozen=True)
class Unfreezing:
    """What becomes of the emulator's tensors that train.

    Attributes:
        policy: `local`: each device keeps its own; `discard`: averaged among devices, left out at plug-in; `map_back`:
            averaged, and what was learnt is added to the full model's original.
        start: These tensors before round 1, in the emulated model, by canonical name.
    """

    policy: str = "discard"
    start: Tensors = field(default_factory=dict)

    def asked_of(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the policy in its client half."""
        if not self.start or self.policy != "local":
            return recipe

        def half(server_round: int) -> Mapping[str, Any]:
            asked = recipe.client(server_round)
            also = {"train_only": [*asked["train_only"], "unfrozen"]} if "train_only" in asked else {}
            return {**asked, **also, "personal": [*asked.get("personal", ()), "unfrozen"]}

        return replace(recipe, client=half)

    def plug_in(self, full: Tuned, state: GlobalState) -> Tuned:
        """Return the full model tuned to `state`: with what was learnt on the emulator only under `map_back`."""
        tensors = {name: state.tensors[name] for name in full.names}
        for name in self.start:
            if name in tensors:  # a delta: a distilled block's tensor is not its original
                tensors[name] = full.initial[name] + (state.tensors[name] - self.start[name])
        full.fold(state.folds)
        full.write(tensors)
        return full


def check_policy(settings: Mapping[str, Any]) -> None:
    """Check the settings of unfreezing against one another.

    Raises:
        ConfigError: If the policy is unknown, or they do not go with other settings.
    """
    client = settings["client"]
    if not client["unfreeze"]:
        return
    asked = f"client.unfreeze={client['unfreeze']}"
    if client["unfreeze_policy"] not in POLICIES:
        wrong = client["unfreeze_policy"]
        raise ConfigError(f"client.unfreeze_policy={wrong}", "no such policy", nearest(str(wrong), POLICIES))
    for key in ("kept_blocks", "emulators"):
        if settings["control"][key]:
            raise ConfigError(f"{asked} needs one emulator", f"control.{key} gives several", "leave one of them out")
    if str(settings["server"]["train"]) == "full" and client["unfreeze_policy"] != "map_back":
        raise ConfigError(
            f"{asked} with client.unfreeze_policy={client['unfreeze_policy']}",
            "server.train=full tunes a model without an emulator",
            "set server.train=emulator or off, or client.unfreeze_policy=map_back",
        )
