"""`fedpeat study emulator`: from words on the command line to a folder of cells and what they show."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from fedpeat.core import ConfigError, nearest
from simulations.compare.command import carried_out, work_of
from simulations.compare.grid import known_names
from simulations.compare.workers import RUN
from simulations.study.again import KIND, write_study
from simulations.study.axes import read_study
from simulations.study.cells import make_cells

KINDS = ("emulator",)

HELP = """fedpeat study emulator: which way to stand in for the middle is worth its costs?

usage: fedpeat study emulator selection=A,B kept=N,M [axis=...] [seeds=N] [key=value ...] [--dry-run]

  fedpeat study emulator selection=uniform,cka kept=2,4,6                        two selections, three depths
  fedpeat study emulator selection=uniform kept=4 compression=none,low_rank,int8
  fedpeat study emulator selection=uniform kept=2,0.5 distillation=0,200 unfreeze=none,attention
  fedpeat study emulator selection=uniform kept=4 data=jsonl,text data.path=FILE rounds=20

Every combination of the axes' values is run with each seed, beside the whole model tuned directly:

  selection=A,B        how kept blocks are chosen: {selections}
  kept=N,0.5           how many: a number of blocks, or a share of the middle (written with a point; 1.0: all)
  compression=none     none, or {stages};
                       two are joined: low_rank+int8
  distillation=0       steps of training the kept blocks on public text to do the whole middle's work
  unfreeze=none        parts of the emulator that devices train: none, attention, mlp, norm; joined: attention+mlp
  policy=map_back      what becomes of what these learn: map_back, discard, local
  reference=true       also tune the whole model on the same data: with the run's PEFT in every block, and in full
  full_learning_rate=  of the latter; default: that of experiment=fed_ft
  federated=true       false: one client with all data (offsite tuning)
  extraction=false     true: in each cell a curious client fine-tunes all it holds
  seeds=3              seeds of each cell: a number (0, 1, 2) or a list, seeds=[4,7]
  metric=NAME          perplexity (the default), loss, accuracy or choice_accuracy of the plug-in model
  jobs=N               cells at once; default: cores / threads of a cell, and 1 with engine=ray or on a GPU
  folder=FOLDER        where everything goes; default: outputs/study/<date>/<time>

Keywords of builders: low_rank.share=0.25,0.5 cka.share=false distilled.learning_rate=0.001 and so on.
Any key or group of 'fedpeat simulate --help' can be given too; several values are swept.

The same command with the folder of an earlier one goes on where that one stopped: finished cells are kept.
The folder gets study.html, .csv, .json, .md, .tex and figures/; cells/ holds the runs. 'fedpeat report FOLDER' writes
them anew. Exit code: 0 all cells finished, 1 some failed (the rest is told), 2 a mistake in what was asked, 130 Ctrl-C.
"""


def study(arguments: Sequence[str], *, run: str = RUN, console: Console | None = None) -> int:
    """Run a study; return the exit code.

    Args:
        arguments: As typed: the kind of study, then what of it.
        run: `module:function` of what runs a cell.
        console: Where to write; standard output by default.

    Raises:
        FedPeatError: For a mistake in what was asked, or a folder that cannot be used; nothing has run then.
    """
    kind, rest = (arguments[0], arguments[1:]) if arguments else ("", ())
    if {"--help", "-h"} & set(arguments):
        print(_help(), end="")
        return 0
    if kind not in KINDS:
        asked = f"fedpeat study {kind}".rstrip()
        raise ConfigError(asked, "no such study", nearest(kind, KINDS))
    console = console or Console(highlight=False)
    cells = make_cells(asked := read_study(rest, known=known_names()))
    for note in cells.notes:
        console.print(Text(note), soft_wrap=True)
    work = work_of(asked.run, cells.grid, run=run, place="outputs/study")
    places = {task.name: task.folder.name for task in (*work.todo, *work.done)}
    roles = {places[name]: role for name, role in cells.roles.items()}
    axes = {name: list(values) for name, values in cells.axes.items()}
    plan = {"kind": KIND, "axes": axes, "roles": roles, "notes": list(cells.notes)}
    return carried_out(work, plan=plan, write=lambda folder: write_study(folder, console=console), console=console)


def _help() -> str:
    from simulations.study.nodes import STAGES, selections

    return HELP.format(selections=", ".join(selections()), stages=", ".join(STAGES))
