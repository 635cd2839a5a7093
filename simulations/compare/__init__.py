"""Which variant of a federation is better, and is the difference more than noise?

`fedpeat compare` runs a grid of settings with several seeds; `fedpeat report` compares runs that are there already.

    request    words on the command line -> Request
    grid       Request -> cells, all settings composed and checked
    estimate   cells -> what they will take
    workers    cells -> runs on the disk, on long-lived processes (`worker` is one)
    collect    folders -> runs; `differences` finds what varies between them
    variants   runs -> Comparison, with the arithmetic of `statistics`
    outputs    Comparison -> files: `table`, `words`, `figures`, `html`; `watch` shows it on a terminal

To add one more number to the table: a key in `variants._costs` and a line in `table.columns`. Nothing is imported here,
so that a worker process loads only what its cells need.
"""
