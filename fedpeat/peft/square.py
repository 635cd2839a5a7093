"""LoRA with a square core, `W + scaling * B @ R @ A`: only R trains; A and B are everybody's from the start."""

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

CORE = "core"
"""Last part of the name of R."""


class CoredFactor(nn.Module):
    """Stands where LoRA has its A, `(rank, in)`: the product of a trained core R and a fixed basis.

    Args:
        basis: `(rank, in)`.
    """

    def __init__(self, basis: torch.Tensor) -> None:
        super().__init__()
        self.basis = nn.Buffer(basis)
        self.core = nn.Parameter(torch.zeros(len(basis), len(basis), dtype=basis.dtype, device=basis.device))

    @property
    def weight(self) -> torch.Tensor:
        """Return `R @ A`, `(rank, in)`, which HF peft reads to merge."""
        return self.core @ self.basis

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return `R A x` for `(..., in)`, `(..., rank)`."""
        return nn.functional.linear(nn.functional.linear(values, self.basis), self.core)


@torch.no_grad()
def put_cores(model: nn.Module, adapter: str) -> None:
    """Turn each LoRA layer of `model` into one with a square core of zeros, in place; only the cores train after that.

    A and B span the principal directions of the layer's own weight: with `W = U S V^T`, `B = U_r sqrt(S_r / S_1)` and
    `A = sqrt(S_r / S_1) V_r^T`, so that the output is unchanged at the start and both are of ordinary size.

    Source: Fed-SB, Singhal et al. 2025, arXiv 2502.15436, section 3 (the core, its mean); LoRA-XS, Balazy et al. 2024,
        arXiv 2405.17604 (bases from the weight).
    Departures: Fed-SB takes its bases from the SVD of a first full gradient, which no party here could compute on all
        data; R starts at 0.
    """
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        if adapter not in layer.lora_A or not isinstance(layer.lora_A[adapter], nn.Linear):
            continue
        # On the CPU, wherever the layer is: the bases must be alike at both ends.
        weight = layer.get_base_layer().weight.detach().float().cpu()  # type: ignore[union-attr, operator]
        if getattr(layer, "fan_in_fan_out", False):
            weight = weight.T
        left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
        wanted = layer.lora_A[adapter].weight.shape[0]  # type: ignore[union-attr, index]
        rank = min(int(wanted), len(sizes))
        root = (sizes[:rank] / sizes[0].clamp_min(1e-12)).sqrt()
        signs = (
            left[:, :rank].gather(0, left[:, :rank].abs().argmax(0, keepdim=True)).sign().squeeze(0)
        )  # LAPACK's choice
        basis, span = right[:rank] * (root * signs)[:, None], left[:, :rank] * (root * signs)
        old = layer.lora_A[adapter].weight  # type: ignore[union-attr]
        pad = int(wanted) - rank
        layer.lora_A[adapter] = CoredFactor(nn.functional.pad(basis, (0, 0, 0, pad)).to(old))  # type: ignore[arg-type]
        b: nn.Parameter = layer.lora_B[adapter].weight  # type: ignore[union-attr, assignment]
        b.copy_(nn.functional.pad(span, (0, pad)))
        b.requires_grad_(False)
