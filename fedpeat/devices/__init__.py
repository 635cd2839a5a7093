"""What does a plan cost on a device?

In bytes, seconds, MiB and joules: profiles of devices, the links between them and the server, pure functions of both,
and the ledger in which a run's costs are written down. Nothing here knows of models, data or plans.

To add one more kind of device: a YAML in `conf/devices/profiles/`. To add one more column of the ledger: a line in
`COLUMNS` of `ledger.py`, and who fills it in.
"""

from fedpeat.devices.channel import (
    MBIT,
    Radio,
    band_shares,
    distance_km,
    drops_out_at,
    equal_shares,
    fading,
    gain,
    is_available,
    path_loss_db,
    radio_rates,
    shannon_bits,
)
from fedpeat.devices.costs import (
    Costs,
    Demand,
    Supply,
    device_ends,
    round_costs,
    round_seconds,
    spent_until,
    transfer_seconds,
)
from fedpeat.devices.fleet import Fleet, Played, Traffic, Work
from fedpeat.devices.flops import BlockShape, forward_flops, step_flops
from fedpeat.devices.ledger import (
    CLOCK,
    COLUMNS,
    Milestone,
    ledger_rows,
    milestones,
    read_ledger,
    totals,
    write_ledger,
)
from fedpeat.devices.profile import Profile, assign, profiles_of, uniform
from fedpeat.devices.trace import Moment, Trace, read_trace

__all__ = [
    "CLOCK",
    "COLUMNS",
    "MBIT",
    "BlockShape",
    "Costs",
    "Demand",
    "Fleet",
    "Milestone",
    "Moment",
    "Played",
    "Profile",
    "Radio",
    "Supply",
    "Trace",
    "Traffic",
    "Work",
    "assign",
    "band_shares",
    "device_ends",
    "distance_km",
    "drops_out_at",
    "equal_shares",
    "fading",
    "forward_flops",
    "gain",
    "is_available",
    "ledger_rows",
    "milestones",
    "path_loss_db",
    "profiles_of",
    "radio_rates",
    "read_ledger",
    "read_trace",
    "round_costs",
    "round_seconds",
    "shannon_bits",
    "spent_until",
    "step_flops",
    "totals",
    "transfer_seconds",
    "uniform",
    "write_ledger",
]
