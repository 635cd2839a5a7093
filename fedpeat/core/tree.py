"""Arithmetic on named tensors: the travelling state, deltas, server-step state."""

import hashlib
from collections.abc import Mapping

import torch

from fedpeat.core.errors import UpdateRefused, shorten

Tensors = Mapping[str, torch.Tensor]
"""Tensors by canonical name (a full model's block indices). Never changed in place by who receives it."""


def add(left: Tensors, right: Tensors) -> dict[str, torch.Tensor]:
    """Return `left + right`, name by name; both hold the same names and shapes."""
    return {name: left[name] + right[name].to(left[name].dtype) for name in left}


def subtract(left: Tensors, right: Tensors) -> dict[str, torch.Tensor]:
    """Return `left - right`, name by name; both hold the same names and shapes."""
    return {name: left[name] - right[name] for name in left}


def zeros_like(tensors: Tensors, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Return zeros of the same names and shapes."""
    return {name: torch.zeros_like(tensor, dtype=dtype) for name, tensor in tensors.items()}


def norm(tensors: Tensors) -> float:
    """Return the Euclidean norm of all entries taken as one vector."""
    # In one pass, without an fp64 copy of a large tensor; squares of fp32 numbers do not overflow in fp64.
    norms = (torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors.values())
    return sum(float(one) ** 2 for one in norms) ** 0.5


def clip(tensors: Tensors, bound: float) -> tuple[dict[str, torch.Tensor], bool]:
    """Return the tensors, scaled as one vector to a norm of `bound` at most, and whether they had to be.

    >>> clip({"w": torch.tensor([3.0, 4.0])}, 2.5)
    ({'w': tensor([1.5000, 2.0000])}, True)
    """
    size = norm(tensors)
    if size <= bound:
        return dict(tensors), False
    return {name: (tensor.double() * (bound / size)).to(tensor.dtype) for name, tensor in tensors.items()}, True


def count_bytes(tensors: Tensors) -> int:
    """Return the payload in bytes: the sum over tensors of entries times bytes an entry."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def all_finite(tensors: Tensors) -> bool:
    """Return whether no entry is NaN or infinite."""
    # A finite sum has finite terms, and takes a tenth of the time; a sum may overflow where no term does.
    return all(bool(tensor.sum().isfinite() or torch.isfinite(tensor).all()) for tensor in tensors.values())


def digest(tensors: Tensors) -> str:
    """Return a hash of names, dtypes, shapes and bytes, whatever the order of the names."""
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if tensor.numel():  # an empty one may have a stride of 0, which view() refuses
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def check_like(tensors: Tensors, like: Tensors, *, what: str) -> None:
    """Check that `tensors` has exactly the names, shapes and dtypes of `like`.

    Raises:
        UpdateRefused: With the names missing, unknown, mis-shaped or mis-typed; `what` says whose tensors they are.
    """
    remedy = "both ends must use the same model, split and peft settings"
    missing = sorted(set(like) - set(tensors))
    unknown = sorted(set(tensors) - set(like))
    if missing or unknown:
        found = [f"missing: {shorten(missing, 3)}"] if missing else []
        found += [f"unknown: {shorten(unknown, 3)}"] if unknown else []
        raise UpdateRefused(f"{what} must hold the {len(like)} travelling tensors", "; ".join(found), remedy)
    for name, tensor in tensors.items():
        expected = like[name]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise UpdateRefused(
                f"{what}: {name!r} must be {tuple(expected.shape)} {expected.dtype}",
                f"it is {tuple(tensor.shape)} {tensor.dtype}",
                remedy,
            )
