"""What gossip brings: hints at who serves what, and evidence of false answers."""

from ..events.gossip import GossipReceived
from ..peers.membership import Membership
from ..peers.trust import Trust
from ..records.announcement import EvidenceEntry, ResponseEntry
from ..records.errors import Refused
from ..records.ids import NetworkId, peer_id
from ..records.limits import CLOCK_SKEW_MS, REGISTRY_TTL_MS
from ..records.now import Now
from .announcer import Inbox
from .evidence import check_evidence
from .hints import Hints


class GossipIntake:
    """Opens batches of authors whose record is here, or who are on this node's lists; `refused` counts the others."""

    def __init__(self, network: NetworkId, own_key: bytes, members: Membership, hints: Hints, trust: Trust) -> None:
        self._own_key = own_key
        self._members = members
        self._hints = hints
        self._trust = trust
        self._inbox = Inbox(network, own_key, self._counts)
        self.refused: dict[str, int] = {}

    def on_gossip(self, event: GossipReceived, now: Now) -> None:
        """Take a batch in."""
        batch = self._inbox.open(event.topic, event.payload, now)
        if isinstance(batch, Refused):
            self._count_refused(batch)
            return
        sender = peer_id(batch.sender)
        self._members.is_alive(sender, now)
        for entry in batch.entries:
            if isinstance(entry, EvidenceEntry):
                self._hear_evidence(batch.sender, entry, now)
            elif now.wall_ms < entry.expires_at_ms <= now.wall_ms + REGISTRY_TTL_MS + CLOCK_SKEW_MS:
                name = entry.request_hash if isinstance(entry, ResponseEntry) else entry.row_id
                self._hints.add(name, sender, entry.expires_at_ms, now.wall_ms)

    def _hear_evidence(self, accuser: bytes, evidence: EvidenceEntry, now: Now) -> None:
        """What others' audits found cannot be checked: it causes audits of this node's own, and nothing else."""
        try:
            if not self._trust.trusts(accuser, now):
                raise Refused("untrusted_accuser")
            if evidence.signer == self._own_key:
                raise Refused("about_us")
            check_evidence(evidence, now.wall_ms)
        except Refused as refused:
            self._count_refused(refused)
        else:
            self._trust.standings.accuse(accuser, evidence.signer, now)

    def _counts(self, public_key: bytes) -> bool:
        return self._members.acquaintance(public_key) is not None

    def _count_refused(self, refused: Refused) -> None:
        self.refused[refused.reason] = self.refused.get(refused.reason, 0) + 1
