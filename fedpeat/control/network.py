"""The policy's layers and its critic in torch, and probabilities of what is chosen; acting needs neither."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from fedpeat.control.policy import LAYERS

SMALL = 0.01
"""What the last layers' first weights are multiplied with: a policy begins nearly uniform."""


class Network(nn.Module):
    """A policy's layers (see `fedpeat.control.policy.Policy`), and a critic on the same context.

    Args:
        shapes: Outputs and inputs of each layer, by name.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.encoder_1, self.encoder_2 = _layer(*shapes["encoder_1"]), _layer(*shapes["encoder_2"])
        self.context, self.device = _layer(*shapes["context"]), _layer(*shapes["device"])
        self.levels, self.refresh = _layer(*shapes["levels"], SMALL), _layer(*shapes["refresh"], SMALL)
        width = shapes["context"][0]
        self.critic_1, self.critic_2 = nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, own: torch.Tensor, common: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return levels' logits of devices, `(rows, devices, levels)`, the refresh's, `(rows, levels)`, and values."""
        code = torch.relu(self.encoder_2(torch.relu(self.encoder_1(own))))
        context = torch.relu(self.context(torch.cat([code.mean(-2), code.amax(-2), common], dim=-1)))
        width = code.shape[-1]
        shared = nn.functional.linear(context, self.device.weight[:, width:], self.device.bias)
        mixed = torch.relu(nn.functional.linear(code, self.device.weight[:, :width]) + shared.unsqueeze(-2))
        value = self.critic_2(torch.relu(self.critic_1(context))).squeeze(-1)
        return self.levels(mixed), self.refresh(context), value

    def acting(self) -> dict[str, np.ndarray]:
        """Return the weights that act, by name."""
        state = self.state_dict()
        names = [f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")]
        return {name: state[name].detach().numpy().copy() for name in names}


def _layer(outputs: int, inputs: int, gain: float = 2**0.5) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Chosen(NamedTuple):
    """Levels, and how likely they were.

    Attributes:
        logs: Log-probability of each branch's level, `(rows, branches)`; 0 where it changes nothing.
        entropy: Of what a row decides, nats, `(rows,)`.
        matters: Whether a branch's level changes anything, `(rows, branches)`: steps and share of those that stay out
            do not, nor does a branch of one level.
    """

    logs: torch.Tensor
    entropy: torch.Tensor
    matters: torch.Tensor


def log_parts(own: torch.Tensor, mask: torch.Tensor, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """Return log-probabilities of the levels of each of a device's branches, `(rows, devices, levels)` each."""
    closed = own.masked_fill(~mask, -1e9)
    return [torch.log_softmax(part, dim=-1) for part in closed.split(list(sizes), dim=-1)]


def draw(
    own: torch.Tensor, refresh: torch.Tensor, mask: torch.Tensor, sizes: tuple[int, ...], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw levels, `(rows, devices, 3)`, and refreshes, `(rows,)`, by their probabilities (Gumbel's way)."""

    def drawn(logs: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(logs).exponential_(generator=generator).clamp_(min=1e-20).log_()
        return (logs - noise).argmax(-1)

    parts = log_parts(own, mask, sizes)
    return torch.stack([drawn(part) for part in parts], dim=-1), drawn(torch.log_softmax(refresh, dim=-1))


def chosen(
    own: torch.Tensor,
    refresh: torch.Tensor,
    mask: torch.Tensor,
    sizes: tuple[int, ...],
    choice: tuple[torch.Tensor, torch.Tensor],
) -> Chosen:
    """Return how likely a choice was: levels, `(rows, devices, 3)`, and refreshes, `(rows,)`."""
    levels, flags = choice
    parts, last = log_parts(own, mask, sizes), torch.log_softmax(refresh, dim=-1)
    into = levels[..., 0] > 0
    able = mask[..., : sizes[0]].sum(-1) > 1
    takes_part = 1 - parts[0][..., 0].exp()
    logs, matters, entropy = [], [], torch.zeros(len(levels))
    for place, part in enumerate(parts):
        matter = able if place == 0 else into & (sizes[place] > 1)
        logs.append(part.gather(-1, levels[..., place : place + 1]).squeeze(-1) * matter)
        matters.append(matter)
        spread = -(part.exp() * part.clamp(min=-1e4)).sum(-1)
        entropy = entropy + (spread if place == 0 else spread * takes_part).sum(-1)
    logs.append(last.gather(-1, flags[:, None]))
    matters.append(torch.full_like(flags[:, None], refresh.shape[-1] > 1, dtype=torch.bool))
    entropy = entropy - (last.exp() * last).sum(-1)
    return Chosen(torch.cat(logs, dim=-1), entropy, torch.cat(matters, dim=-1))
