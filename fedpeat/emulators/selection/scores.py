"""Builders that score the middle's blocks on public text, and keep those that matter most.

Scores are of the full model's blocks, whatever builders before in a chain did to them; they are worked out once for a
model, a text and the settings (see `fedpeat.emulators.cache`), and stay in the notes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedpeat.core import ConfigError, ModelError, Tensors, nearest
from fedpeat.emulators.blocks import Blocks, BuildContext, Builder
from fedpeat.emulators.cache import cache_key, cached_json
from fedpeat.emulators.selection.activations import check_rows, public_rows
from fedpeat.emulators.selection.measures import (
    Measure,
    Scores,
    block_influences,
    gradient_changes,
    loss_increases,
    run_distances,
)
from fedpeat.emulators.selection.rules import blocks_at, check_enough, check_kept

TOKENS = ("last", "all")


def block_influence(*, kept_blocks: int, rows: int = 64) -> Builder:
    """Keep the `kept_blocks` blocks that turn the hidden states most.

    The block influence of block i is `1 - mean over tokens of cos(x_i, x_i+1)`, where x_i enters the block and x_i+1
    leaves it; padding does not count. The lowest are dropped; of equals, the earlier stays.

    Args:
        kept_blocks: From 1 to as many as the middle has.
        rows: Public rows that are used, at even distances.

    Raises:
        ConfigError: If the server has no public text, or the middle too few blocks (when the builder is applied), or a
            number is below 1.

    Source: X. Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, 2024,
    arXiv:2403.03853, equation 1.

    Departures: only blocks of the middle are candidates; the adapter stays whatever its influence.
    """
    return _scored("block_influence", kept_blocks, rows, "1 - cosine", block_influences)


def ablation(*, kept_blocks: int, rows: int = 64) -> Builder:
    """Keep the `kept_blocks` blocks that the full model misses most.

    A block's score is the rise of the full model's loss, in nats a token, when that one block is skipped (negative if
    the model is better without it). The lowest are dropped; of equals, the earlier stays.

    Args:
        kept_blocks: From 1 to as many as the middle has.
        rows: Public rows that are used, at even distances; each block costs a pass over them.

    Raises:
        ConfigError: If the server has no public text, or the middle too few blocks (when the builder is applied), or a
            number is below 1.
        DataError: If the public text has no token to predict.

    Source: B.-K. Kim et al., Shortened LLaMA: A Simple Depth Pruning for Large Language Models, 2024, arXiv:2402.02834,
    section 3 (the perplexity criterion).

    Departures: loss instead of its exponential, which orders blocks alike; no block is exempt but the adapter's.
    """
    return _scored("ablation", kept_blocks, rows, "nats/token", loss_increases)


def gradient(*, kept_blocks: int, rows: int = 32) -> Builder:
    """Keep the `kept_blocks` blocks without which the adapter would be tuned in another direction.

    A block's score is `1 - cosine` between two gradients of the full model's mean loss for the adapter's parameters:
    with all blocks, and with that one skipped; the cosine is taken for each of the adapter's blocks, over all of its
    parameters, and averaged over them. The lowest are dropped; of equals, the earlier stays.

    Args:
        kept_blocks: From 1 to as many as the middle has.
        rows: Public rows that are used, at even distances; each block costs a forward and backward pass over them.

    Raises:
        ConfigError: If the server has no public text, or the middle too few blocks (when the builder is applied), or a
            number is below 1.
        DataError: If the public text has no token to predict.

    Source: K. Yao et al., GradOT: Training-free Gradient-preserving Offsite-tuning for Large Language Models, 2025,
    arXiv:2507.04455: keep what keeps the adapter's gradients.

    Departures: GradOT compresses within blocks by a second-order estimate of the change, and rewards a rise of the loss
    for privacy; here whole blocks are dropped, so the change of one is measured, not estimated, and nothing rewards a
    loss. Gradients are those of parameters, not of hidden states, which cost no less (the passes are the same) and
    tell less: states between adapter and middle do not show that the blocks behind the middle get other inputs. One
    cosine for each block, since the gradients of one block are often far longer than those of the others.
    """
    return _scored("gradient", kept_blocks, rows, "1 - cosine", gradient_changes)


def angular_distance(*, kept_blocks: int, rows: int = 64, tokens: str = "last") -> Builder:
    """Drop the run of neighbouring blocks that turns the hidden states least, and keep the other `kept_blocks`.

    Of m blocks, n = m - `kept_blocks` neighbours l, l + 1 ... are dropped for which the angular distance
    `arccos(cos(x_l, x_l+n)) / pi` of what enters the first and what leaves the last, averaged over rows, is smallest;
    of equals, the earlier run. A half turn is 1.

    Args:
        kept_blocks: From 1 to as many as the middle has.
        rows: Public rows that are used, at even distances.
        tokens: At which tokens: the `last` of a row that is no padding, or `all` that are none.

    Raises:
        ConfigError: If the server has no public text, or the middle too few blocks (when the builder is applied), or a
            number is below 1, or `tokens` is neither.

    Source: A. Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, 2024, arXiv:2403.17887, section 3.

    Departures: runs of the middle alone; where blocks of an adapter that is spread out stand within a run, its distance
    is the sum of those of its parts, since the adapter's blocks stay. Nothing is healed here.
    """
    check_kept(kept_blocks)
    check_rows(rows)
    if tokens not in TOKENS:
        raise ConfigError(f"cannot score blocks at tokens={tokens!r}", "no such choice", nearest(tokens, TOKENS))

    def build(blocks: Blocks) -> Blocks:
        check_enough(blocks, kept_blocks)
        context = blocks.needed_context("angular")
        places = [block.place for block in blocks.blocks]
        length = len(places) - kept_blocks
        runs = [places[start : start + length] for start in range(kept_blocks + 1)] if length else []
        text = public_rows(blocks, "angular", rows)

        measure = run_distances(runs, every_token=tokens == "all")
        settings = {"length": length, "tokens": tokens}
        scores = cached_scores(context, text, places, "angular", settings, measure) if runs else {}
        dropped = min(runs, key=lambda run: (scores[run[0]], run[0]), default=[])
        kept = [place for place in places if place not in dropped]
        note = {**_note("angular", "run", "half turns", scores, kept, dropped), "length": length}
        return blocks.having(blocks_at(blocks, kept), note)

    return Builder("angular", {"kept_blocks": kept_blocks, "rows": rows, "tokens": tokens}, build)


def cached_scores(
    context: BuildContext,
    rows: Tensors,
    places: Sequence[int],
    builder: str,
    settings: Mapping[str, Any],
    measure: Measure,
) -> Scores:
    """Return what `measure` says of the full model's blocks `places`, worked out only if it is not in the cache.

    Args:
        context: Whose model and cache.
        rows: Public rows to measure on, `(rows, tokens)` each.
        places: Indices in the full model, ascending.
        builder: The builder's name.
        settings: Its keywords that change the scores.
        measure: What works them out.

    Raises:
        ModelError: If a score is not finite.
    """
    key = cache_key(context, builder, rows, {**settings, "blocks": list(places)})

    def make() -> dict[str, float]:
        scores = measure(context, rows, places, f"scoring blocks: {builder}")
        odd = [index for index, score in scores.items() if not math.isfinite(score)]
        if odd:
            found = f"the score of block {odd[0]} is {scores[odd[0]]}"
            raise ModelError(f"cannot score blocks by {builder}", found, "load the model in float32 or bfloat16")
        return {str(index): score for index, score in scores.items()}

    return {int(index): score for index, score in cached_json(context, key, make).items()}


def _scored(name: str, kept_blocks: int, rows: int, unit: str, measure: Measure) -> Builder:
    check_kept(kept_blocks)
    check_rows(rows)

    def build(blocks: Blocks) -> Blocks:
        check_enough(blocks, kept_blocks)
        context = blocks.needed_context(name)
        places = [block.place for block in blocks.blocks]
        scores = cached_scores(context, public_rows(blocks, name, rows), places, name, {}, measure)
        ranked = sorted(places, key=lambda place: (-scores[place], place))
        kept, dropped = sorted(ranked[:kept_blocks]), sorted(ranked[kept_blocks:])
        return blocks.having(blocks_at(blocks, kept), _note(name, "score", unit, scores, kept, dropped))

    return Builder(name, {"kept_blocks": kept_blocks, "rows": rows}, build)


def _note(
    builder: str, what: str, unit: str, scores: Scores, kept: Sequence[int], dropped: Sequence[int]
) -> dict[str, Any]:
    return {
        "builder": builder,
        "what": what,
        "unit": unit,
        "higher_stays": True,
        "scores": {str(index): score for index, score in scores.items()},
        "kept": list(kept),
        "dropped": list(dropped),
    }
