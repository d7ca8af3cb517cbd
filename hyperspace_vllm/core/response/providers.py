"""Peers that may have a response or a row: those that are said to, and which of them a lookup asks first."""

import random

from ..peers.membership import Membership
from ..peers.trust import Trust
from ..records.ids import PeerId
from ..records.now import Now
from ..registry.registry import Registry
from .hints import Hints
from .lookup import ProviderCandidate

QUIET_MS, QUIET_MAX = 5_000, 4  # of peers that are not connected, those heard of lately are likelier to be reached


class Providers:
    """What gossip and the registry say of others; `me` is never one of them."""

    def __init__(
        self, me: PeerId, members: Membership, registry: Registry, hints: Hints, trust: Trust, rng: random.Random
    ) -> None:
        self._me = me
        self._members = members
        self._registry = registry
        self._hints = hints
        self._trust = trust
        self._standings = trust.standings
        self._rng = rng

    def of(self, name: bytes, now: Now) -> tuple[PeerId, ...]:
        """Others that say they serve an id (request hash or row id); hints."""
        told = (*self._hints.providers(name, now.wall_ms), *self._registry.providers(name, now.wall_ms))
        return tuple(peer for peer in dict.fromkeys(told) if peer != self._me)

    def best_first(self, told: tuple[PeerId, ...], now: Now) -> list[ProviderCandidate]:
        """Providers that can be asked now, the best first: worth waiting for, good, connected, lately heard of, near.

        The second is the first that said so: peers that claim what others have are heard after them, and with a fifth
        of the network doing so, one provider in twenty that claim it is the one that has it.
        """
        found = []
        for peer in dict.fromkeys(told):
            known = self._members.get(peer)
            if peer == self._me or known is None or not known.may_be_asked(now) or self._standings.avoids(peer, now):
                continue
            score = round(self._standings.service(peer, now), 1)
            quiet = min((now.mono_ms - known.alive_at_ms) // QUIET_MS, QUIET_MAX)
            waited_for = self._trust.may_be_waited_for(peer, now)
            standing = not waited_for, known.silent, -score, not known.connected, quiet
            candidate = ProviderCandidate(known.peer, known.address, known.rtt_ms, known.connected, waited_for)
            found.append(((*standing, known.rtt_ms, self._rng.random()), candidate))
        best = [candidate for _, candidate in sorted(found, key=lambda each: each[0])]
        spoken = [candidate for (_, silent, *_), candidate in found if not silent]
        first = min(spoken, key=lambda each: not each.worth_waiting, default=None)
        if first is not None and first is not best[0]:
            best = [best[0], first, *(candidate for candidate in best[1:] if candidate is not first)]
        return best
