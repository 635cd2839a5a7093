"""MLPs with fewer inner channels."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from fedpeat.core import ConfigError
from fedpeat.emulators.blocks import Block, Blocks, Builder
from fedpeat.emulators.compression.layers import Linear, as_weight, matrix_of, shape_of
from fedpeat.emulators.compression.shrink import Encoded, check_share, compress
from fedpeat.models import linear_layers, sublayers


class Mlp(NamedTuple):
    """An MLP's linear layers, by path in their block.

    Attributes:
        producers: From the model's width to the inner channels, or to gates and values of all of them one after the
            other.
        consumers: From the inner channels to the model's width.
        channels: How many inner channels there are.
    """

    producers: dict[str, Linear]
    consumers: dict[str, Linear]
    channels: int


def ffn_channels(*, share: float = 0.5) -> Builder:
    """Keep attention, and of each MLP the inner channels with the largest weights.

    The size of inner channel c is the L2 norm of all weights that lead to it or come from it,
    `sqrt(sum |W_in[c, :]|^2 + |W_out[:, c]|^2)`, gates counted with the weights that lead to it. The
    `max(1, floor(share * channels))` largest stay, in their order; of equal ones, the first. What is left computes what
    the whole MLP computes with the other channels at 0.

    An MLP is found by structure: linear layers side by side, from the model's width to F or 2F (gates and values in one
    layer) and from F back.

    Args:
        share: Inner channels that stay, above 0 and at most 1.

    Raises:
        ConfigError: If the share is out of range, or (when it is applied) a block has no such MLP, or something else in
            it depends on the inner channels.

    Source: Z. Peng et al., FedPFT: Federated Proxy Fine-Tuning of Foundation Models, IJCAI 2024, arXiv:2404.11536,
    section on sub-model construction.

    Departures: It does not keep the first and last block whole (the adapter may); alignment is a stage of its own.
    """
    check_share(share, builder="ffn_channels")

    def build(blocks: Blocks) -> Blocks:
        width = _width(blocks)

        def encode(block: Block) -> dict[str, Encoded]:
            mlps = find_mlps(block.module, width)
            if not mlps:
                _refuse(block.module, "it has no linear layers from the model's width to inner channels and back")
            new = {}
            for mlp in mlps:
                sizes = channel_sizes(mlp)
                new |= _encode(mlp, largest(sizes, max(1, int(share * mlp.channels))))
            return new

        return compress(blocks, builder="ffn_channels", kind="ffn_channels", encode=encode)

    return Builder("ffn_channels", {"share": share}, build)


def find_mlps(block: nn.Module, width: int) -> list[Mlp]:
    """Find the MLPs of a block whose residual stream is `width` wide.

    Raises:
        ConfigError: If something else in an MLP depends on its inner channels.
    """
    kinds = sublayers(block)
    groups: dict[str, dict[str, Linear]] = {}
    for path, layer in linear_layers(block).items():
        if kinds[f"{path}.weight"] == "mlp":
            groups.setdefault(path.rpartition(".")[0], {})[path] = layer
    found = []
    for parent, layers in groups.items():
        inner = {shape_of(layer)[1] for layer in layers.values() if shape_of(layer)[0] == width} - {width}
        for channels in sorted(inner):
            mlp = _mlp(layers, width, channels)
            if mlp.producers:
                _check_alone(block, parent, mlp)
                found.append(mlp)
    return found


def _mlp(layers: Mapping[str, Linear], width: int, channels: int) -> Mlp:
    inwards = {(channels, width), (2 * channels, width)}
    producers = {path: layer for path, layer in layers.items() if shape_of(layer) in inwards}
    consumers = {path: layer for path, layer in layers.items() if shape_of(layer) == (width, channels)}
    return Mlp(producers, consumers, channels)


def _check_alone(block: nn.Module, parent: str, mlp: Mlp) -> None:
    """Check that no other tensor beside or below the MLP's layers has a side as long as it has channels."""
    kinds = sublayers(block)
    own = {f"{path}.{name}" for path in (*mlp.producers, *mlp.consumers) for name in ("weight", "bias")}
    tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    for name, tensor in tensors.items():
        near = name.startswith(f"{parent}.") if parent else kinds.get(name) != "attention"
        if near and name not in own and {mlp.channels, 2 * mlp.channels} & set(tensor.shape):
            _refuse(block, f"{name!r} depends on the inner channels too")


def channel_sizes(mlp: Mlp) -> torch.Tensor:
    """Return the L2 norm `(channels,)` of all weights of each inner channel, in fp64."""
    squares = sum(matrix_of(layer).double().square().sum(dim=0) for layer in mlp.consumers.values())
    for layer in mlp.producers.values():
        rows = matrix_of(layer).double().square().sum(dim=1)
        squares = squares + rows.reshape(-1, mlp.channels).sum(dim=0)
    return torch.as_tensor(squares).sqrt()


def largest(sizes: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices of the `count` largest sizes, in their order; of equal ones, the first.

    >>> largest(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0]), 3)
    tensor([1, 2, 3])
    """
    return torch.sort(sizes, descending=True, stable=True).indices[:count].sort().values


def _encode(mlp: Mlp, kept: torch.Tensor) -> dict[str, Encoded]:
    new = {}
    for path, layer in mlp.consumers.items():
        weight = as_weight(layer, matrix_of(layer)[:, kept])
        new[path] = Encoded({"inputs": len(kept)}, {"weight": weight})
    for path, layer in mlp.producers.items():
        # Gates and values one after the other: the same channels of both.
        rows = torch.cat([kept + start for start in range(0, shape_of(layer)[0], mlp.channels)])
        values = {"weight": as_weight(layer, matrix_of(layer)[rows])}
        if layer.bias is not None:
            values["bias"] = layer.bias.detach()[rows]
        new[path] = Encoded({"outputs": len(rows)}, values)
    return new


def _width(blocks: Blocks) -> int:
    model = blocks.needed_context("ffn_channels").model
    return model.config.get_text_config(decoder=True).hidden_size


def _refuse(block: nn.Module, found: str) -> None:
    raise ConfigError(
        f"emulator=ffn_channels cannot find the MLP of a {type(block).__name__}",
        found,
        "choose emulator=low_rank, pruned, int8 or int4, or put this stage before those",
    )
