"""Peers: which are known, connected, dialled, believed and avoided.

Input: greetings, records, deliveries and misdeeds. Output: bounds on what a peer may cost and verdicts on what
counts. A peer is a node as seen by this one. Signatures are checked in `core/records`, before anything arrives here.
"""
