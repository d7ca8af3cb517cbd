"""The node: `node` is the one core that shells step; `network_part` and the machines beside it are its part for others.

Input: events. Output: effects.
"""
