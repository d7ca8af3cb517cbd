"""When a change of what a node serves requires a new PeerRecord."""

from ..events.node_state import ServedChanged
from ..records.peer_record import PeerRecord
from ..records.vram_digest import difference

LOAD_STEP_PERMILLE = 100
DIGEST_STEP = 0.1  # share of the bits


def should_renew_record(told: PeerRecord, served: ServedChanged) -> bool:
    """Whether the record is renewed at once, and not only within a minute as usual.

    A record of up to 8 KiB goes to every neighbour, and through them to all peers. A small change of the segments or of
    the load can wait.
    """
    return (
        told.models != served.models
        or told.fingerprints != served.fingerprints
        or abs(told.load_permille - served.load_permille) >= LOAD_STEP_PERMILLE
        or difference(told.vram_digest, served.vram_digest) >= DIGEST_STEP
    )
