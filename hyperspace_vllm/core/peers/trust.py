"""Which signers' proofs and manifests count (docs/design.md). A signature only proves which key made a statement.

    members     peers on this node's own lists, and peers that were shown to hold the network key
    reputation  these too, and for responses peers that have earned trust
    allowlist   only peers on the allowlist

Of a peer's two separate scores (standing.py), trust uses `word`, which only audits raise: a peer that only relays earns
none, however well it serves. KV is never audited, so a peer cannot earn trust for its manifests.

Membership by the network key has no end: a member's tag travels beside what it signed (signing.member_tag), so that its
proofs and manifests count after it has left, also in nodes that never met it. Only a new key revokes it. A peer that
this node's own audits convicted does not count for a day, even if it is on a list (standing.py).
"""

import hmac
from collections import OrderedDict
from typing import Literal

from ..records.ids import PeerId, peer_id, public_key_of
from ..records.limits import PEERS_KNOWN_MAX
from ..records.now import Now
from ..records.rank import Tier
from ..records.signing import NO_MEMBER_TAG, member_tag
from .reputation import THRESHOLD
from .standing import Standings

TRIAL_EVERY_MS = 10_000  # between untrusted signers' answers that are audited and never served, all together
PASSED_TOKENS_MIN = 16  # a shorter answer can be guessed, so it earns nothing
TrustMode = Literal["members", "reputation", "allowlist"]
Verdict = Literal["passed", "dropped", "lie"]  # of an audit (response/evidence.py)
SHOWN_MAX = PEERS_KNOWN_MAX * 8  # includes members that have left; their tags come again with what they signed


class Trust:
    """Which signers count. Keys are Ed25519 public keys: `listed` of the static lists, `allowed` of the allowlist."""

    def __init__(
        self,
        mode: TrustMode,
        own_key: bytes,
        listed: frozenset[bytes],
        allowed: frozenset[bytes],
        network_key: bytes | None,
        is_public: bool = False,
    ) -> None:
        """`is_public`: this node shares with every peer (`share = "public"`)."""
        self.mode: TrustMode = mode
        self._is_public = is_public
        self.standings = Standings(own_key)
        self._next_trial_ms = 0
        self._own_key = own_key
        self._listed = listed
        self._allowed = allowed
        self._network_key = network_key
        self._shown: OrderedDict[bytes, None] = OrderedDict()  # to hold the network key; longest not met first

    def meet(self, public_key: bytes, tag: bytes) -> bool:
        """Take note of a member tag if it is one of this network; returns whether the peer is a member."""
        if self._is_ours(public_key, tag):
            self._shown[public_key] = None
            self._shown.move_to_end(public_key)
            if len(self._shown) > SHOWN_MAX:
                self._shown.popitem(last=False)
        return self.is_member(public_key)

    def is_member(self, public_key: bytes) -> bool:
        """Whether it is this node, on its static lists, or was shown to hold the network key."""
        return public_key == self._own_key or public_key in self._listed or public_key in self._shown

    def is_listed(self, public_key: bytes) -> bool:
        """Whether the operator named this peer: in `peers`, `bootstrap` or `allowed`."""
        return public_key in self._listed or public_key in self._allowed

    @property
    def listed(self) -> frozenset[bytes]:
        """Every peer that the operator named."""
        return self._listed | self._allowed

    def trusts(self, public_key: bytes, now: Now) -> bool:
        """Whether the responses that this peer signed count."""
        if self.trusts_kv(public_key, now):
            return True
        if self.mode != "reputation" or self.is_convicted(public_key, now):
            return False
        return self.standings.word(peer_id(public_key), now) >= THRESHOLD

    def trusts_kv(self, public_key: bytes, now: Now) -> bool:
        """Whether the manifests that this peer signed count."""
        if public_key == self._own_key:
            return True
        if self.is_convicted(public_key, now):
            return False
        return public_key in self._allowed or (self.mode != "allowlist" and self.is_member(public_key))

    def is_convicted(self, public_key: bytes, now: Now) -> bool:
        """Whether nothing that this peer signed counts; no peer is convicted while this node doubts itself."""
        return self.standings.is_convicted(public_key, now) and not self.standings.doubts_itself(now)

    def take_trial(self, public_key: bytes, now: Now) -> bool:
        """Whether a response of this untrusted signer is audited now, and not served; once per TRIAL_EVERY_MS."""
        if self.mode != "reputation" or self.is_convicted(public_key, now):
            return False
        if now.mono_ms < self._next_trial_ms:
            return False
        self._next_trial_ms = now.mono_ms + TRIAL_EVERY_MS
        return True

    def may_trust_others(self) -> bool:
        """Whether any signer but this node can count."""
        by_membership = self.mode == "members" and bool(self._listed or self._network_key)
        return self.mode == "reputation" or by_membership or bool(self._allowed)

    def audited(self, public_key: bytes, tokens: int, verdict: Verdict, source: bytes, now: Now) -> bool:
        """Take in this node's own audit of a response that this peer signed; returns whether that convicts the peer.

        `source` is the source of the client that asked for the response (findings.py).
        """
        if public_key == self._own_key:
            return False
        if verdict == "passed":
            if tokens >= PASSED_TOKENS_MIN:
                self.standings.passed(public_key, source, now)
            return False
        self.standings.accuse(self._own_key, public_key, now)
        return verdict != "dropped" and self.standings.found_false(public_key, source, now)

    def is_chosen(self, public_key: bytes) -> bool:
        """Whether the peer counts by the operator's choice: a member, or on the allowlist.

        Only such peers get what is shared with the network.
        """
        return self.is_member(public_key) or public_key in self._allowed

    def serves_kv(self, public_key: bytes) -> bool:
        """Whether this peer is served KV: a chosen one, or any by `reputation` if this node shares with every peer."""
        return self.is_chosen(public_key) or (self.mode == "reputation" and self._is_public)

    def asks_for_kv(self, public_key: bytes) -> bool:
        """Whether KV is asked of this peer: a chosen one, or any by `reputation`."""
        return self.is_chosen(public_key) or self.mode == "reputation"

    def has_standing(self, peer: PeerId) -> bool:
        """Whether the peer was chosen, or has delivered: other peers' hints do not replace its own."""
        return self.standings.has_earned(peer) or self.is_chosen(public_key_of(peer))

    def tier(self, peer: PeerId) -> Tier:
        """The order of service: peers on this node's own lists and peers that have delivered, then members."""
        if self.standings.has_earned(peer) or self.is_listed(public_key_of(peer)):
            return Tier.PROVEN
        return Tier.MEMBER if self.has_standing(peer) else Tier.STRANGER

    def may_be_waited_for(self, peer: PeerId, now: Now) -> bool:
        """Whether a request may wait for what this peer announced."""
        if self.is_convicted(public_key_of(peer), now):
            return False
        return self.standings.has_earned(peer) or (self.has_standing(peer) and self.standings.lends(now))

    def vouch(self, public_key: bytes) -> bytes:
        """The member tag of a signer that is known to hold the network key; zeros for any other.

        Peers that are only on this node's own lists get none: the lists are this node's, not the network's.
        """
        if self._network_key is None or (public_key != self._own_key and public_key not in self._shown):
            return NO_MEMBER_TAG
        return member_tag(self._network_key, public_key)

    def _is_ours(self, public_key: bytes, tag: bytes) -> bool:
        if self._network_key is None or tag == NO_MEMBER_TAG:
            return False
        return hmac.compare_digest(member_tag(self._network_key, public_key), tag)
