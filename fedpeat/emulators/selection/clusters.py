"""Builders that find blocks of the middle which compute alike, and let one of them stand for the others."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from fedpeat.core import ConfigError, DataError, Tensors
from fedpeat.emulators.blocks import Block, Blocks, BuildContext, Builder
from fedpeat.emulators.selection.activations import check_rows, counted, public_rows, see_states
from fedpeat.emulators.selection.measures import Scores
from fedpeat.emulators.selection.rules import between_adapters, blocks_at, check_enough, check_kept
from fedpeat.emulators.selection.scores import cached_scores


def cka(*, kept_blocks: int, share: bool = True, rows: int = 64) -> Builder:
    """Cluster neighbouring blocks that leave similar states, and keep one block of each of `kept_blocks` clusters.

    At first each block is a cluster. The two neighbouring clusters are merged whose adjoining blocks (the last of one,
    the first of the other) leave states of the highest linear CKA over rows, a row's state being the mean over its
    tokens that are no padding; of equals, the earlier two; until `kept_blocks` clusters are left. Of each, the middle
    member stays; of an even number, the later of the two in the middle.

    Args:
        kept_blocks: From 1 to as many as the middle has.
        share: Whether the nearest kept block computes in the place of each removed one (see `shared`): the full depth
            without further tensors.
        rows: Public rows that are used, at even distances; two or more.

    Raises:
        ConfigError: If the server has too little public text, or the middle too few blocks (when the builder is
            applied), or a number is too small, or blocks of the adapter divide the middle into more runs than
            `kept_blocks`.
        DataError: If fewer than two rows have a token.

    Source: K. Zhang et al., CRaSh: Clustering, Removing, and Sharing Enhance Fine-tuning without Full Large Language
    Model, 2023, arXiv:2310.15477, section 3, and the authors' code (which blocks are compared, which member stays).

    Departures: only the middle is clustered, not the whole model, and no cluster reaches over a block of the adapter.
    """
    check_kept(kept_blocks)
    check_rows(rows, least=2)

    def build(blocks: Blocks) -> Blocks:
        check_enough(blocks, kept_blocks)
        context = blocks.needed_context("cka")
        places = [block.place for block in blocks.blocks]
        runs = between_adapters(places, context.split.adapter)
        _check_runs(len(runs), kept_blocks)
        text = public_rows(blocks, "cka", rows)
        similarities = cached_scores(context, text, places, "cka", {}, neighbour_similarities)
        clusters, merges = merge(runs, similarities, kept_blocks)
        kept = [cluster[len(cluster) // 2] for cluster in clusters]
        chosen = blocks.having(blocks_at(blocks, kept), _note(places, kept, clusters, merges, similarities))
        return _filled(chosen, places) if share else chosen

    return Builder("cka", {"kept_blocks": kept_blocks, "share": share, "rows": rows}, build)


def shared() -> Builder:
    """Let the nearest of the blocks compute in the place of each block that the middle had and they lack.

    The emulator is then as deep as the full model, without further tensors. Nearest is by index, whatever stands in
    between; of two as near, the earlier.

    Raises:
        ConfigError: If there is no block, or nothing tells what the middle was (when the builder is applied).

    Source: K. Zhang et al., CRaSh, 2023, arXiv:2310.15477, section 3 (sharing).

    Departures: the middle alone is filled; blocks of the adapter are never shared.
    """

    def build(blocks: Blocks) -> Blocks:
        places = blocks.needed_context("shared").split.middle
        if not blocks.blocks and places:
            raise ConfigError("cannot share blocks in the emulator", "it has none", "keep one or more, then share")
        return _filled(blocks, places)

    return Builder("shared", {}, build)


def linear_cka(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the linear centred kernel alignment of two representations of the same rows, from 0 to 1.

    Args:
        one: `(rows, width)`.
        other: `(rows, another width)`.

    Source: S. Kornblith et al., Similarity of Neural Network Representations Revisited, 2019, arXiv:1905.00414,
    section 3; computed from the Gram matrices of the rows, which are fewer than the features.

    Departures: 0 where one of the two is the same for all rows, which leaves it undefined.

    >>> linear_cka(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[5.0], [3.0], [1.0]]))
    1.0
    """
    first, second = _gram(one), _gram(other)
    lengths = float(first.norm() * second.norm())
    return min(float((first * second).sum()) / lengths, 1.0) if lengths else 0.0


def neighbour_similarities(context: BuildContext, rows: Tensors, places: Sequence[int], telling: str) -> Scores:
    """Return the linear CKA of what each block leaves with what the next of `places` leaves; the last has none.

    Raises:
        DataError: If fewer than two rows have a token.
    """
    if int(counted(rows).any(1).sum()) < 2:
        raise DataError("cannot compare blocks by CKA", "fewer than two public rows have a token", "give it more text")
    pooled: dict[int, list[torch.Tensor]] = {place: [] for place in places}

    def see(index: int, _: torch.Tensor, leaving: torch.Tensor, real: torch.Tensor) -> None:
        # Not masked by a product: states of padding may be NaN.
        sums = leaving.double().where(real[..., None], 0.0).sum(1)
        pooled[index].append((sums / real.sum(1, keepdim=True).clamp(min=1))[real.any(1)])

    see_states(context, rows, places, see, telling=telling)
    whole = {place: torch.cat(parts) for place, parts in pooled.items()}
    return {place: linear_cka(whole[place], whole[following]) for place, following in pairwise(places)}


def merge(
    runs: Sequence[Sequence[int]], similarities: Mapping[int, float], count: int
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Merge neighbours within `runs` of blocks, the most similar first, until `count` clusters are left.

    Args:
        runs: Indices, ascending; no cluster reaches from one run into the next.
        similarities: Of each block and the next in its run.
        count: Not fewer than there are runs, nor more than there are blocks.

    Returns:
        The clusters in order; and which two blocks each merge joined, in the order of the merges.

    >>> merge([[1, 2, 3], [5, 6]], {1: 0.9, 2: 0.8, 5: 0.9}, 3)
    ([[1, 2], [3], [5, 6]], [(1, 2), (5, 6)])
    """
    # Clusters are compared by their adjoining blocks, so merging changes no similarity: the best pairs are the merges.
    pairs = [pair for run in runs for pair in pairwise(run)]
    ranked = sorted(pairs, key=lambda pair: (-similarities[pair[0]], pair[0]))
    merges = ranked[: sum(len(run) for run in runs) - count]
    joined = {second for _, second in merges}
    clusters: list[list[int]] = []
    for place in (place for run in runs for place in run):
        if place in joined:
            clusters[-1].append(place)
        else:
            clusters.append([place])
    return clusters, merges


def _gram(states: torch.Tensor) -> torch.Tensor:
    whole = states.double()
    centred = whole - whole.mean(0)
    if centred.norm() <= 1e-12 * whole.norm():  # all rows alike, but for rounding
        centred = torch.zeros_like(centred)
    return centred @ centred.T


def _filled(blocks: Blocks, places: Sequence[int]) -> Blocks:
    own = {block.place: block for block in blocks.blocks}

    def at(place: int) -> Block:
        nearest = own[min(own, key=lambda index: (abs(index - place), index))]
        return nearest if nearest.place == place else replace(nearest, place=place)

    everywhere = tuple(at(place) for place in sorted({*places, *own}))
    sources = {str(block.place): block.source for block in everywhere}
    return blocks.having(everywhere, {"builder": "shared", "what": "source", "sources": sources})


def _check_runs(runs: int, kept: int) -> None:
    if kept < runs:
        raise ConfigError(
            f"cannot keep {kept} middle blocks by emulator=cka",
            f"blocks of the adapter divide the middle into {runs} runs, and one of each stays",
            f"set emulator.kept_blocks >= {runs} or model.split.first and model.split.last",
        )


def _note(
    places: Sequence[int],
    kept: Sequence[int],
    clusters: Sequence[Sequence[int]],
    merges: Sequence[tuple[int, int]],
    similarities: Scores,
) -> dict[str, Any]:
    return {
        "builder": "cka",
        "what": "clusters",
        "unit": "linear CKA",
        "clusters": [list(cluster) for cluster in clusters],
        "merges": [list(pair) for pair in merges],
        "similarity": [similarities[first] for first, _ in merges],
        "kept": list(kept),
        "dropped": [place for place in places if place not in set(kept)],
    }
