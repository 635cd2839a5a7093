"""What the linear layers of a block get as inputs, summed up over public text."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from fedpeat.core import Tensors
from fedpeat.emulators.assemble import EmulatedModel
from fedpeat.emulators.selection.activations import counted

DAMPING = 0.01


@torch.no_grad()
def input_moments(
    view: EmulatedModel, positions: Iterable[int], paths: Iterable[str], batches: Iterable[Tensors]
) -> dict[str, torch.Tensor]:
    """Return `sum x x'`, `(in, in)` in fp32, over the inputs x of linear layers of a block, by path.

    Args:
        view: An emulated model.
        positions: Where the block stands in it.
        paths: The layers, within the block; one that no token reaches is left out.
        batches: `input_ids` and perhaps `attention_mask`, `(rows, tokens)`, on the model's device; what is masked out
            does not count.
    """
    sums: dict[str, torch.Tensor] = {}
    real = torch.ones(0, dtype=torch.bool)

    def adding(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def see(_layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            tokens = inputs[0].detach().flatten(0, -2).float()
            if len(tokens) == real.numel():  # experts see fewer tokens, in an order of their own
                tokens = tokens[real.flatten()]
            sums[path] = sums.get(path, 0) + tokens.T @ tokens

        return see

    stack, paths = view.model.get_submodule(view.path), list(paths)
    layers = [(path, stack.get_submodule(f"{position}.{path}")) for position in positions for path in paths]
    handles = [layer.register_forward_pre_hook(adding(path)) for path, layer in layers]
    try:
        for batch in batches:
            real = counted(batch)
            given = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
            view.model(**given, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return sums


def damped_root(moments: torch.Tensor) -> torch.Tensor:
    """Return lower triangular `L` in fp64 with `L L' = moments + DAMPING * mean(diag) * I`.

    >>> damped_root(torch.tensor([[3.96, 0.0], [0.0, 3.96]]))
    tensor([[1.9999, 0.0000],
            [0.0000, 1.9999]], dtype=torch.float64)
    """
    exact = moments.double()
    mean = float(exact.diagonal().mean())
    identity = torch.eye(len(exact), dtype=exact.dtype, device=exact.device)
    if mean == 0:  # a layer that got nothing but zeros: all its weights matter alike
        return identity
    return torch.linalg.cholesky(exact + DAMPING * mean * identity)
