"""How fast is a federation, and how much memory does it take, beside the plainest program that does the same work?

One module a section: what it compares is said in its first lines. `stage` sets up what is measured, `processes` gives
each measurement a process of its own, `samples` turns times into medians and ratios, `tables` prints.

To add one more: a module with `measure(folder, *, smoke) -> Section`, and a row of `SECTIONS` in `simulation.py`.
"""
