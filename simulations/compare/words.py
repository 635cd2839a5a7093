"""What a comparison says, in a sentence or two."""

from simulations.compare.table import Told, columns, with_error
from simulations.compare.variants import Comparison, Variant
from simulations.report import printable
from simulations.report.wording import change


def told_of(comparison: Comparison) -> Told:
    """Return what all outputs of a comparison tell."""
    return Told("comparison", [in_words(comparison)], columns(comparison), comparison.variants)


def in_words(comparison: Comparison) -> str:
    """Return who is best, by how much, and whether that is more than noise between seeds."""
    ranked = [variant for variant in comparison.variants if variant.result is not None and variant.ranked]
    if not ranked:
        return "No variant has a result yet."
    best = ranked[0]
    if len(ranked) == 1:
        only = "Only " if len(comparison.variants) > 1 else ""
        return f"{only}{printable(best.label)} reached {comparison.metric_words} {_result(best)}{_seeds(best)}."
    first = f"{printable(best.label)} is best: {comparison.metric_words} {_result(best)}{_seeds(best)}."
    return f"{first} {_against(best, ranked)}"


def _result(variant: Variant) -> str:
    return "" if variant.result is None else with_error(variant.result)


def _seeds(variant: Variant) -> str:
    return f" over {len(variant.finals)} seeds" if len(variant.finals) > 1 else ", of one seed"


def _against(best: Variant, ranked: list[Variant]) -> str:
    """Say how the best variant compares with its baseline, or, where it is the baseline, with the next."""
    if best.verdict == "baseline":
        return "No variant is better than the baseline." if ranked[1:] else ""
    base = next((one for one in ranked if one.verdict == "baseline" and _same_rest(one, best)), None)
    if base is None or base.result is None or best.result is None or best.difference is None:
        return "Its baseline has no result to compare with."
    how = f"That is {change(best.result.mean, base.result.mean)} {printable(base.label)} ({_result(base)})"
    if best.verdict == "unknown":
        return f"{how}; whether that is more than noise, one seed cannot tell."
    more = "more than" if best.verdict == "better" else "no more than"
    return f"{how}, {more} the noise between seeds."


def _same_rest(one: Variant, other: Variant) -> bool:
    return list(one.values.values())[1:] == list(other.values.values())[1:]


def status_of(comparison: Comparison) -> tuple[str, str]:
    """Return a status as reports know it (finished, interrupted, failed) and how many runs are how."""
    counts: dict[str, int] = {}
    for placed in comparison.runs:
        counts[placed.run.status] = counts.get(placed.run.status, 0) + 1
    every = sum(counts.values())
    words = f"{counts.get('finished', 0)} of {every} runs finished"
    if counts.get("finished") == every:
        return "finished", f"{every} runs finished"
    others = [
        f"{count} {'not run' if name == 'missing' else name}" for name, count in counts.items() if name != "finished"
    ]
    return ("failed" if "failed" in counts else "interrupted"), ", ".join([words, *others])
