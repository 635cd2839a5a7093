"""Small problems to decide about."""

from dataclasses import replace

import numpy as np

from fedpeat.control import Curves, Menu, Objective, Observation, Pair, Problem
from fedpeat.control.world import Scene
from fedpeat.devices import Radio

PAIRS = (Pair("small", 2), Pair("small", 8), Pair("large", 2), Pair("large", 8))


def problem(devices=3, *, pairs=PAIRS, steps=(5, 10), shares=(1.0,), refresh=False, radio=None, memory=None, seed=0):
    """A problem of devices that differ; `memory` in the unit in which pairs need 1, 2, 3, ..."""
    draw = np.random.default_rng(seed)
    menu = Menu(pairs, steps, shares, refresh)
    count, emulators = len(pairs), len(menu.emulators)
    return Problem(
        clients=tuple(f"client-{place}" for place in range(devices)),
        menu=menu,
        rounds=3,
        flops=draw.uniform(1e9, 1e11, devices),
        memory_bytes=np.full(devices, count) if memory is None else np.array(memory, dtype=float),
        watt=draw.uniform(0.1, 3.0, (devices, 4)),
        data_share=draw.dirichlet(np.ones(devices)),
        step_flops=np.linspace(1e10, 4e10, count),
        needs_bytes=np.arange(1.0, count + 1),
        bytes_down=np.linspace(1e5, 5e5, count),
        bytes_up=np.linspace(1e5, 4e5, count),
        kept=np.linspace(0.25, 0.75, emulators),
        bundle_bytes=np.linspace(1e6, 4e6, emulators),
        refresh_bytes=np.linspace(1e5, 2e5, emulators),
        radio=radio,
    )


def seen(of, *, number=1, available=None, holds=None, stale=None, seed=0):
    """What is known of a round of it."""
    draw = np.random.default_rng(seed)
    devices, emulators = len(of.clients), len(of.menu.emulators)
    rates = draw.uniform(1e6, 5e7, (2, devices)) if of.radio is None else np.full((2, devices), np.nan)
    return Observation(
        round=number,
        available=np.ones(devices, dtype=bool) if available is None else np.array(available, dtype=bool),
        gains=draw.uniform(1e-12, 1e-10, devices),
        down_bits=rates[0],
        up_bits=rates[1],
        holds=np.zeros((devices, emulators), dtype=bool) if holds is None else np.array(holds),
        stale=np.zeros((devices, emulators), dtype=bool) if stale is None else np.array(stale),
    )


CELL = Radio()


def scene(of=None, *, objective=None, curves=None, rounds=3, **more):
    """A scene of a problem, with its links drawn once."""
    of = replace(of or problem(), rounds=rounds)
    draw = np.random.default_rng(7)
    devices = len(of.clients)
    links = {"gains": draw.uniform(1e-12, 1e-10, devices)}
    if of.radio is None:
        links = {"down_bits": draw.uniform(1e6, 5e7, devices), "up_bits": draw.uniform(1e6, 5e7, devices)}
    return Scene(of, objective or Objective(time=0.05), curves or Curves(pace=1.0, ageing=0.5), **{**links, **more})
