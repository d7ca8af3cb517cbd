"""The protocol: pure decisions without IO.

Machines take an event and the time, and return effects. No clock, no socket, no file, no task and no random generator
of their own: what they use is handed to them. `daemon` performs the effects with real parts, `sim` with simulated
ones. The room may import nothing of the package outside itself.
"""
