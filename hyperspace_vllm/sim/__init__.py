"""Deterministic simulation of many nodes: the real core on a virtual clock.

`world` simulates L2, `fleet` the network with L1, gossip, DHT and registry. One seed gives one run; `checkers` have the
rules that every run must keep. This package performs the effects that the daemon performs with real parts.
"""
