"""Whose proofs and manifests count (docs/design.md). A signature only proves who said it; this says who is believed.

    members     those in this node's own lists, and everybody who was shown to hold the network key
    reputation  these too, and for responses whoever has earned it
    allowlist   exactly those on the allowlist

Of the two scores of a peer (standing.py), which never add up, belief takes `word`, which grows by audits alone: a relay
can serve well all day and is believed nothing. KV is never audited, so no peer earns belief for its manifests.

Holding the network key is membership for good: a member's tag travels beside what it signed (signing.member_tag), so
that its proofs and manifests count after it has left, in nodes that never met it. There is no revocation but a new key.
Whom this node's own audits convicted doesn't count for a day, whatever list it is on (standing.py).
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

TRIAL_EVERY_MS = 10_000  # an answer of a stranger that is audited and never served, of all strangers together
PASSED_TOKENS_MIN = 16  # a shorter answer is soon guessed, so it earns nothing
TrustMode = Literal["members", "reputation", "allowlist"]
Verdict = Literal["passed", "dropped", "lie"]  # of an audit (response/evidence.py)
SHOWN_MAX = PEERS_KNOWN_MAX * 8  # those who have left count too; their tags come again with what they signed


class Trust:
    """Who counts. Keys are Ed25519 public keys: `listed` of the static lists, `allowed` of the allowlist."""

    def __init__(
        self,
        mode: TrustMode,
        own_key: bytes,
        listed: frozenset[bytes],
        allowed: frozenset[bytes],
        network_key: bytes | None,
        is_public: bool = False,
    ) -> None:
        """`is_public`: this node shares with everybody (`share = "public"`)."""
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
        """Take note of a member tag, if it is one of this network's; whether the peer is a member."""
        if self._is_ours(public_key, tag):
            self._shown[public_key] = None
            self._shown.move_to_end(public_key)
            if len(self._shown) > SHOWN_MAX:
                self._shown.popitem(last=False)
        return self.is_member(public_key)

    def is_member(self, public_key: bytes) -> bool:
        """This node itself, on its static lists, or shown to hold the network key."""
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
        """Whether nothing that this peer signed counts; of nobody while this node doubts itself."""
        return self.standings.is_convicted(public_key, now) and not self.standings.doubts_itself(now)

    def take_trial(self, public_key: bytes, now: Now) -> bool:
        """Whether a response of this untrusted signer is audited, unserved, now; a yes lasts TRIAL_EVERY_MS."""
        if self.mode != "reputation" or self.is_convicted(public_key, now):
            return False
        if now.mono_ms < self._next_trial_ms:
            return False
        self._next_trial_ms = now.mono_ms + TRIAL_EVERY_MS
        return True

    def may_trust_others(self) -> bool:
        """Whether anybody but this node can ever count."""
        by_membership = self.mode == "members" and bool(self._listed or self._network_key)
        return self.mode == "reputation" or by_membership or bool(self._allowed)

    def audited(self, public_key: bytes, tokens: int, verdict: Verdict, source: bytes, now: Now) -> bool:
        """Take in this node's own audit of a response that this peer signed; whether the peer is convicted by it.

        `source` is what the client that asked for the response can't be twice.
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
        """Whether the peer counts by the operator's choice, whatever it did: a member, or on the allowlist.

        It gets what is shared with the network, and nobody else does.
        """
        return self.is_member(public_key) or public_key in self._allowed

    def serves_kv(self, public_key: bytes) -> bool:
        """Whether this peer is served KV: a stranger only by `reputation`, from a node that shares with everybody."""
        return self.is_chosen(public_key) or (self.mode == "reputation" and self._is_public)

    def asks_for_kv(self, public_key: bytes) -> bool:
        """Whether KV is asked of this peer: by `reputation` of strangers too, if `has_standing`."""
        return self.is_chosen(public_key) or self.mode == "reputation"

    def has_standing(self, peer: PeerId) -> bool:
        """Whether the peer was chosen, or has delivered: strangers' hints don't take its place."""
        return self.standings.has_earned(peer) or self.is_chosen(public_key_of(peer))

    def tier(self, peer: PeerId) -> Tier:
        """Whose needs come first: those on this node's own lists and those that have delivered, then members."""
        if self.standings.has_earned(peer) or self.is_listed(public_key_of(peer)):
            return Tier.PROVEN
        return Tier.MEMBER if self.has_standing(peer) else Tier.STRANGER

    def may_be_waited_for(self, peer: PeerId, now: Now) -> bool:
        """Whether a request may wait for what this peer says it has."""
        if self.is_convicted(public_key_of(peer), now):
            return False
        return self.standings.has_earned(peer) or (self.has_standing(peer) and self.standings.lends(now))

    def vouch(self, public_key: bytes) -> bytes:
        """The member tag of a signer that is known to hold the network key; zeros for everybody else.

        Peers that are merely on this node's own lists get none: those lists are this node's opinion, not the network's.
        """
        if self._network_key is None or (public_key != self._own_key and public_key not in self._shown):
            return NO_MEMBER_TAG
        return member_tag(self._network_key, public_key)

    def _is_ours(self, public_key: bytes, tag: bytes) -> bool:
        if self._network_key is None or tag == NO_MEMBER_TAG:
            return False
        return hmac.compare_digest(member_tag(self._network_key, public_key), tag)
