"""What does a person see of a finished (or interrupted) run?

The summary that scripts read, its meaning in words, the figures, and one self-contained HTML page.

To add one more figure: a function in `figures.py` from reports to a `Figure` (or None where there is nothing to show)
and its line in `draw`; for one more number: a key in `summarise` and a line in `fedpeat.core.METRICS`.
"""

from simulations.report.html import write_report
from simulations.report.summary import in_words, summarise
from simulations.report.wording import printable

__all__ = [
    "in_words",
    "printable",
    "summarise",
    "write_report",
]
