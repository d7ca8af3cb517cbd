"""What a node serves, and when a change of it is worth a new PeerRecord."""

from ..events.node_state import ServedChanged
from ..records.peer_record import PeerRecord
from ..records.vram_digest import difference

LOAD_STEP_PERMILLE = 100
DIGEST_STEP = 0.1  # share of the bits


def should_renew_record(told: PeerRecord, served: ServedChanged) -> bool:
    """Whether others should hear of it before the record is renewed anyway, within a minute.

    A record of up to 8 KiB goes to every neighbour, and through them to everybody: a few more segments, or another
    request on top of many, can wait.
    """
    return (
        told.models != served.models
        or told.fingerprints != served.fingerprints
        or abs(told.load_permille - served.load_permille) >= LOAD_STEP_PERMILLE
        or difference(told.vram_digest, served.vram_digest) >= DIGEST_STEP
    )
