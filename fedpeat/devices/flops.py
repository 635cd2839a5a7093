"""How many FLOP a local step takes, from a model's shape alone."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockShape:
    """What a transformer block multiplies by.

    Attributes:
        weights: Entries of its dense matrices, frozen and trainable ones, without what is beside them (LoRA).
        trained: Entries of those of them that train; 0 with LoRA.
        added: Entries of low-rank factors beside them, which train.
        first: Entries of the matrices that are fed the block's input (queries, keys, values): in the lowest block that
            trains, no gradient goes through them to what is below. 0 where the norm in front of them trains too.
        first_added: Entries of the low-rank factors that are fed the block's input (their A).
        attention_width: Query heads times their size.
    """

    weights: int
    trained: int = 0
    added: int = 0
    first: int = 0
    first_added: int = 0
    attention_width: int = 0


def forward_flops(rows: int, tokens: int, blocks: Sequence[BlockShape], head: int) -> int:
    """Return the FLOP of a forward pass: two for each entry of a matrix and token, and attention's two products.

    Attention counts all pairs of tokens, also those that a causal mask hides, as kernels and counters do.

    Args:
        rows: Of a batch.
        tokens: Of a row.
        blocks: From the lowest; a shared one at each of its places.
        head: Entries of the matrix that makes logits.

    >>> forward_flops(1, 4, [BlockShape(weights=100, attention_width=8)], 50)
    1712
    """
    entries = head + sum(block.weights + block.added for block in blocks)
    return 2 * rows * tokens * entries + sum(_attention(rows, tokens, block) for block in blocks)


def step_flops(rows: int, tokens: int, blocks: Sequence[BlockShape], head: int) -> int:
    """Return the FLOP of a training step: the forward pass, and a backward pass as deep as the lowest trained block.

    On the way back each product of the forward pass has one for its input's gradient, and one for its weight's where
    that trains; attention's two products have four. Norms, activation functions, the loss and the optimiser are left
    out: they are linear in what the matrices are quadratic in.

    Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1 (2 FLOP an entry and token forward, 4 backward).
    Departures: frozen weights have no gradient of their own, and nothing below the lowest trained block has any.
    """
    place = next((n for n, block in enumerate(blocks) if block.trained or block.added), len(blocks))
    if place == len(blocks):
        return forward_flops(rows, tokens, blocks, head)
    back = head + sum(block.weights + block.trained + 2 * block.added for block in blocks[place:])
    back -= blocks[place].first + blocks[place].first_added
    attended = sum(2 * _attention(rows, tokens, block) for block in blocks[place:])
    return forward_flops(rows, tokens, blocks, head) + 2 * rows * tokens * back + attended


def _attention(rows: int, tokens: int, block: BlockShape) -> int:
    """Return the FLOP of `Q K^T` and of the product with the values, forward."""
    return 4 * rows * tokens * tokens * block.attention_width
