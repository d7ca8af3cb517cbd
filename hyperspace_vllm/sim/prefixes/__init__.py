"""L2 in simulated hosts: the real core of prefixes, engines that ask for them, and links on which they travel.

`kv_fleet` is what all hosts share, `sim_prefixes` the part of one host; `sim_bulk` moves bytes that don't exist, as
batches of columns; `kv_load` has every size and rate. `kv_checkers` hold what must be true in each run, by what
`kv_truth` knows, and `kv_figures` say what came of it. Nothing here decides what the core decides.
"""
