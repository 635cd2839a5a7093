"""What does each device hold, and how is it batched?

One way through: `spec` checks the settings, `sources` reads documents, `text` cleans and tokenises them, `partition`
gives each to one client, `split` holds some out for validation and test, `packing` makes rows of equal length, `shards`
keeps the clients with enough of them, `federated` writes all that once, under a hash of everything it depends on, and
`rows` opens one client's part in any process. Where held-out documents are questions with a few possible answers,
`choices` has each of them with every answer.

To add one more source: a function and a row of `SOURCES` in `sources.py`, and `conf/data/<name>.yaml`.
"""

from fedpeat.data.choices import Choices, open_choices
from fedpeat.data.federated import prepare
from fedpeat.data.plot import plot_clients
from fedpeat.data.rows import (
    PARTS,
    POOLED,
    ClientShard,
    FederatedData,
    Rows,
    client_table,
    open_federated,
    open_rows,
)
from fedpeat.data.sources import SOURCES
from fedpeat.data.spec import DataSpec

__all__ = [
    "PARTS",
    "POOLED",
    "SOURCES",
    "Choices",
    "ClientShard",
    "DataSpec",
    "FederatedData",
    "Rows",
    "client_table",
    "open_choices",
    "open_federated",
    "open_rows",
    "plot_clients",
    "prepare",
]
