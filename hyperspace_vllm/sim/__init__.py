"""Deterministic simulation of many nodes: the real cores on a virtual clock.

`fleet` is a network of hosts (`host`), each with a whole node: L1, gossip, DHT and registry, and L2 (`prefixes`).
`sim_clients` ask for responses, engines for prefixes. One seed gives one run; the checkers of both have the rules that
every run must keep. `world` simulates L2 alone, with faults of single columns. The package performs the effects that
the daemon performs with real parts.
"""
