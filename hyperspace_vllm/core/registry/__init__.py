"""The registry: which peer says that it can serve which ids, as one CRDT document an owner.

Input: signed deltas that peers pass on. Output: those worth keeping and passing on. loro itself runs in a worker
process (`daemon/workers`): the room sees deltas as bytes and their ids as sets.
"""
