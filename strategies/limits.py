"""What one client may claim in a round: how large an update, how much weight, how much of the whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedpeat.core import ClientUpdate, DevicePlan, UpdateRefused, norm


@dataclass(frozen=True)
class Limits:
    """Bounds on what clients say and send; by default none but that a norm is not absurd.

    Attributes:
        update_norm: Largest Euclidean norm of a decoded delta, or of what a recipe has sent beside it; None for any.
        rows: Rows that each client declared before the run, by name: who trains on more is refused.
        tokens_a_step: Most tokens of an optimiser step (rows of a batch times tokens of a row); 0 for any.
        weight_share: Largest share of one client in what the devices of a round may weigh together; a larger weight
            is cut to it. None for any.
    """

    update_norm: float | None = 1e6
    rows: Mapping[str, int] = field(default_factory=dict)
    tokens_a_step: int = 0
    weight_share: float | None = None

    def most(self, device: DevicePlan, weight_by: str) -> float | None:
        """Return the largest weight that a device can have come by honestly; None where that is not known.

        >>> Limits(rows={"ann": 30}).most(DevicePlan("ann", 5), "rows")
        30.0
        """
        known = {
            "equal": 1.0,
            "rows": float(self.rows[device.client]) if device.client in self.rows else None,
            "tokens": float(device.local_steps * self.tokens_a_step) or None,
        }
        return known.get(weight_by)

    def applied(
        self, update: ClientUpdate, device: DevicePlan, devices: Sequence[DevicePlan], weight_by: str
    ) -> tuple[ClientUpdate, bool]:
        """Return the update as it may count, and whether its weight was cut.

        The share is of what all devices of the round may weigh at most, not of what came: so an update can be folded
        as it comes, and a client gains nothing from others' failures beyond their part.

        Args:
            update: Decoded.
            device: Its plan.
            devices: All plans of the round.
            weight_by: What weights are.

        Raises:
            UpdateRefused: If its norm or weight is out of bounds.
        """
        what = f"the update of {update.client!r} in round {update.round}"
        self._check_norm(update, what)
        most = self.most(device, weight_by)
        if most is not None and update.weight > most:
            raise UpdateRefused(
                f"{what} may weigh {most:g} {weight_by} at most: {self._why(device, weight_by)}",
                f"it says {update.weight:g}",
                "look at that client: its data or its word has changed",
            )
        cap = self._cap(devices, weight_by)
        return (update, False) if cap is None or update.weight <= cap else (replace(update, weight=cap), True)

    def _check_norm(self, update: ClientUpdate, what: str) -> None:
        if self.update_norm is None:
            return
        size = max(norm(update.delta), norm(update.extras))
        if size > self.update_norm:
            raise UpdateRefused(
                f"{what} must have a norm of at most round.max_update_norm={self.update_norm:g}",
                f"it has {size:.3g}",
                "lower its learning rate; or raise the bound, if such updates are wanted",
            )

    def _why(self, device: DevicePlan, weight_by: str) -> str:
        if weight_by == "tokens":
            return f"{device.local_steps} steps of {self.tokens_a_step} tokens"
        return "as it declared" if weight_by == "rows" else "all weigh alike"

    def _cap(self, devices: Sequence[DevicePlan], weight_by: str) -> float | None:
        weights = [self.most(device, weight_by) for device in devices]
        known = [weight for weight in weights if weight is not None]
        if self.weight_share is None or len(known) < len(weights):
            return None
        return self.weight_share * sum(known)
