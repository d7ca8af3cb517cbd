"""Deterministic simulation of many nodes: the real cores on a virtual clock.

`fleet` is a network of hosts, each with both cores: L1, gossip, DHT and registry (`host`), and L2 (`prefixes`).
`sim_clients` ask for responses, engines for prefixes. One seed gives one run; the checkers of both hold what must be
true in each. `world` plays L2 alone, with faults of single columns. The room performs the effects that the daemon
performs with real parts.
"""
