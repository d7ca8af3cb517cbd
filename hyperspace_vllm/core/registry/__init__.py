"""The registry: which peer announces which ids, as one CRDT document per owner.

Input: signed deltas that peers pass on. Output: those to keep and pass on. loro itself runs in a worker process
(`daemon/workers`): this package sees deltas as bytes and their ids as sets.
"""
