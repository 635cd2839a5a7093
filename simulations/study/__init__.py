"""Which way to stand in for the middle is worth its costs? `fedpeat study emulator`.

A factorial experiment: every combination of a selection of blocks, a number of them, a compression, a distillation and
an unfreezing, each with several seeds, beside the whole model tuned directly. Everything that runs cells and reads them
is `simulations.compare`'s.

    axes      words on the command line -> Asked
    nodes     one value of each axis -> the run's `emulator` node, or why there is none; `depth` counts blocks
    cells     Asked -> all settings, composed and checked
    results   runs -> Study, with the arithmetic of `simulations.compare.statistics`
    again     Study -> files: `table`, `words`, `figures`, `heat`, `outputs`

To add one more compressing builder: a line in `nodes.STAGES`. To add one more number to the table: a line in
`results.MEASURES` and one in `table.columns`.
"""
