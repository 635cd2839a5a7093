"""How are clients executed? In this process (`serial`), or on many workers (`ray`).

An engine is a value with `run(main, slots)`: it calls `main(grid, nodes)` with a Flower `Grid` and the ids of `slots`
nodes, and returns what `main` returns. Any node may act for any client: the message says for which.
"""

from simulations.engines.ray import RayEngine, ray
from simulations.engines.serial import SerialEngine, serial

__all__ = ["RayEngine", "SerialEngine", "ray", "serial"]
