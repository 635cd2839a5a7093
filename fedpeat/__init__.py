"""FedPEAT: federated, parameter-efficient, emulator-assisted tuning of foundation models.

The library. Its rooms, from the ground up:

- `fedpeat.core`: what passes between rooms
- `fedpeat.models`, `fedpeat.emulators`, `fedpeat.peft`, `fedpeat.data`, `fedpeat.control`, `fedpeat.wire`: peers
- `fedpeat.client`, `fedpeat.server`: the two ends of a federation

`strategies` (aggregation) and `simulations` (settings, engines, command line) are the application on top; this package
never imports them.
"""

__version__ = "0.1.0"
