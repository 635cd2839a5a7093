"""What a study says, in a few sentences."""

from collections.abc import Iterator, Sequence

from simulations.compare.statistics import Interval
from simulations.compare.table import with_error
from simulations.report.wording import percent, printable, size
from simulations.study.cells import FULL, WHOLE
from simulations.study.results import Setup, Study

LISTED = 4
"""So many setups are named in a sentence."""


def sentences(study: Study) -> list[str]:
    """Return what came out, the most important first; once for each text that is scored."""
    parts = study.parts
    found = []
    for part in parts:
        place = ", ".join((part.setups or part.references)[0].place) if len(parts) > 1 else ""
        told = list(_sentences(part))
        found += [f"{printable(place)}: {told[0]}", *told[1:]] if place and told else told
    return found or ["No setup has a result yet."]


def notes(study: Study) -> list[str]:
    """Return how to read the numbers."""
    found = []
    if study.seeds == 1:
        found.append("One seed says nothing of the noise between seeds: no difference is called larger than it.")
    elif study.seeds:
        text = f"Means over {study.seeds} seeds, ± the half-width of a 95 % t-interval; differences are paired by seed."
        compared = sum(setup.behind is not None for setup in study.setups)
        text += f" The best was picked by the same seeds, and of {compared} intervals 1 in 20 misses by chance."
        found.append(text if compared else text.partition(" The best")[0])
    if any(setup.result for setup in study.setups):
        found.append(
            "Emulated: adapter and emulator, tuned, which is what a device has; before tuning: the same at the start."
            " Privacy margin: emulated minus plug-in loss, nats/token. Parameters: the emulator's, and their share of"
            " the middle's. Bundle: what a device fetches, and its share of the full model. Memory and step: to train"
            " on a device, and their share of the full model's with PEFT in the same blocks."
        )
    if any(setup.interval("transfer_gap") for setup in study.setups):
        found.append("Transfer gap: plug-in loss minus that of the whole model tuned by the same PEFT in every block.")
    return found


def _sentences(study: Study) -> Iterator[str]:
    known = [setup for setup in study.setups if setup.result]
    if known:
        yield _best(study, known)
        yield from _cheapest(known)
        yield from _worse_than_emulated(study, known)
    yield from _references(study, known)


def _best(study: Study, known: Sequence[Setup]) -> str:
    best, others = known[0], known[1:]
    result = f"plug-in {study.metric_words} {_value(best)}"
    if not others:
        return f"{_name(best)} reaches {result}{_seeds(best)}."
    first = f"{_name(best)} is best: {result}{_seeds(best)}."
    beaten = [setup for setup in others if setup.verdict == "worse"]
    near = [setup for setup in others if setup.verdict == "within noise"]
    if len(beaten) + len(near) < len(others) and not beaten and not near:
        return f"{first} Whether that is more than noise between seeds, one seed cannot tell."
    if not near:
        return f"{first} It is better than all others by more than the noise between seeds."
    cannot = f"{_listed(near)} cannot be told from it"
    if not beaten:
        return f"{first} That is no more than noise: {cannot}."
    than = f"It is better than {len(beaten)} of {len(others)} others by more than the noise between seeds"
    return f"{first} {than}; {cannot}."


def _cheapest(known: Sequence[Setup]) -> Iterator[str]:
    """Say what is as good as the best, as far as seeds can tell, and needs less memory."""
    equal = [
        setup for setup in known if setup.verdict in {"best", "within noise"} and setup.mean("client_memory_bytes")
    ]
    if len(equal) < 2:
        return
    least, best = min(equal, key=lambda setup: setup.mean("client_memory_bytes") or 0.0), known[0]
    if least is best:
        yield f"It also needs the least memory of these: {_memory(least)}."
    else:
        needs = f"{_name(least)} needs the least memory to train: {_memory(least)}"
        yield f"Of these, {needs} ({_name(best)}: {_memory(best)})."


def _memory(setup: Setup) -> str:
    own, full = setup.mean("client_memory_bytes"), setup.mean("full_memory_bytes")
    return size(own) + (f", {percent(own / full)} of the full model's" if own and full else "")


def _worse_than_emulated(study: Study, known: Sequence[Setup]) -> Iterator[str]:
    """Say where plugging in makes the model worse: the adapter has learnt to make up for the emulator."""
    margins = [(setup, setup.interval("privacy_margin")) for setup in known]
    found = [(setup, margin) for setup, margin in margins if margin is not None]
    below = [(setup, margin) for setup, margin in found if margin.mean < 0]
    sure = [setup for setup, margin in below if margin.excludes_zero]
    if not below:
        if found:
            yield "Everywhere the plug-in model has a lower loss than the emulated one."
        return
    worst = min(below, key=lambda pair: pair[1].mean)[0]
    how = f"by more than noise in {len(sure)}" if study.seeds > 1 else "of one seed"
    yield (
        f"In {len(below)} of {len(found)} setups plugging in raises the loss over the emulated model's ({how}):"
        f" {_listed([setup for setup, _ in below])}; there the adapter has learnt to make up for its emulator"
        f" (most in {_name(worst)}: {_nats(worst.interval('privacy_margin'))} nats/token)."
    )


def _references(study: Study, known: Sequence[Setup]) -> Iterator[str]:
    found = {role: [one for one in study.references if one.role == role and one.result] for role in (WHOLE, FULL)}
    told = [f"{_name(one)} reaches {_value(one)}" for role in found for one in found[role][:1]]
    before = next((setup.mean("full_zero_shot") for setup in (*known, *study.references) if setup.result), None)
    if before is not None:
        told.append(f"the full model before tuning has {_plain(before)}")
    if not told:
        return
    text = "; ".join(told)
    gap = known[0].interval("transfer_gap") if known else None
    if gap is not None:
        side = "above" if gap.mean >= 0 else "below"
        sure = "" if gap.half is None else (", beyond noise" if gap.excludes_zero else ", within noise")
        whole = next((_name(one) for one in found[WHOLE]), "the whole model")
        text += f". The best setup's loss is {_nats(gap, unsigned=True)} nats/token {side} that of {whole}{sure}"
    yield f"{text[0].upper()}{text[1:]}."


def _name(setup: Setup) -> str:
    return printable(setup.label, 60)


def _value(setup: Setup) -> str:
    return "" if setup.result is None else with_error(setup.result)


def _plain(value: float) -> str:
    return with_error(Interval(value, None, 1))


def _nats(found: Interval | None, *, unsigned: bool = False) -> str:
    if found is None:
        return ""
    return with_error(found._replace(mean=abs(found.mean))) if unsigned else with_error(found, signed=True)


def _seeds(setup: Setup) -> str:
    count = len(setup.measures["plug_in"])
    return f" over {count} seeds" if count > 1 else ", of one seed"


def _listed(setups: Sequence[Setup]) -> str:
    names = [_name(setup) for setup in setups[:LISTED]]
    more = len(setups) - LISTED
    if more > 0:
        return "; ".join([*names, f"and {more} more"])
    return " and ".join(names) if len(names) < 3 else "; ".join([*names[:-1], f"and {names[-1]}"])
