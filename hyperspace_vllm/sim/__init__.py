"""Deterministic simulation of many nodes: the real core on a virtual clock.

`world` plays L2, `fleet` the network with L1, gossip, DHT and registry. One seed gives one run; `checkers` hold what
must be true in each. The room performs the effects that the daemon performs with real parts.
"""
