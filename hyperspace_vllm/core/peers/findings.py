"""Results of this node's own audits of signers, and what follows: trust, conviction, or self-doubt.

    pass       earns trust, once per PASS_EVERY_MS for each source of requests
    finding    counts against the signer, once for each source and at most once per FINDING_EVERY_MS

A source is the network that a client's requests come from: one client cannot be two sources. Clients choose what is
audited, and one client alone must not get an honest signer convicted or a new one trusted. FINDINGS_MIN findings
convict, unless this node doubts itself: it disagrees with several signers, and with more than it agrees with. Then its
own engine is more likely to be wrong. Here too each source counts once: one client must not clear a liar by findings
against many other signers. Rejected: weighing findings by the tokens' distance, which means nothing if an engine is
broken.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..records.now import Now

PASS_EVERY_MS = 3_600_000
FINDINGS_MIN = 3
FINDING_EVERY_MS = 300_000  # so that a conviction takes ten minutes
KEPT_MS = 24 * 3_600_000
SOURCES_MAX = 256  # of one signer: the least recent are forgotten
DOUBTED_MIN = 3  # signers, or sources


@dataclass(slots=True)
class Findings:
    """The findings on one signer."""

    passed_ms: OrderedDict[bytes, int] = field(default_factory=OrderedDict)  # by source, when it last counted
    found_ms: OrderedDict[bytes, int] = field(default_factory=OrderedDict)

    def passed(self, source: bytes, now: Now) -> bool:
        """An answer passed an audit; returns whether that counts for the signer."""
        return _note(self.passed_ms, source, now, PASS_EVERY_MS)

    def found(self, source: bytes, now: Now) -> bool:
        """An audit found an answer false; returns whether there are enough findings to convict the signer."""
        if all(_is_older(at_ms, FINDING_EVERY_MS, now) for at_ms in self.found_ms.values()):
            _note(self.found_ms, source, now, KEPT_MS)
        return len(self.against(now)) >= FINDINGS_MIN

    def against(self, now: Now) -> set[bytes]:
        """The sources whose findings count against the signer."""
        return _since(self.found_ms, now)

    def agrees(self, now: Now) -> bool:
        """Whether answers passed audits, and the findings are too few to convict the signer."""
        return bool(_since(self.passed_ms, now)) and len(self.against(now)) < FINDINGS_MIN


def doubts(found: Iterable[Findings], now: Now) -> bool:
    """Whether these, one of each signer, say that the engine of this node errs."""
    disagrees, agrees, sources = 0, 0, set[bytes]()
    for findings in found:
        agrees += findings.agrees(now)
        against = findings.against(now)
        if len(against) >= FINDINGS_MIN:
            disagrees += 1
        else:
            sources |= against
    disagrees += len(sources)  # too few to convict a signer each, so each may be of one client
    return disagrees >= DOUBTED_MIN and disagrees > agrees


def _note(since_ms: OrderedDict[bytes, int], source: bytes, now: Now, every_ms: int) -> bool:
    """Whether it is the source's first within that time; if so, it is noted."""
    last_ms = since_ms.get(source)
    if last_ms is not None and not _is_older(last_ms, every_ms, now):
        return False
    since_ms[source] = now.mono_ms
    since_ms.move_to_end(source)
    if len(since_ms) > SOURCES_MAX:
        since_ms.popitem(last=False)
    return True


def _since(since_ms: OrderedDict[bytes, int], now: Now) -> set[bytes]:
    return {source for source, at_ms in since_ms.items() if not _is_older(at_ms, KEPT_MS, now)}


def _is_older(at_ms: int, age_ms: int, now: Now) -> bool:
    return now.mono_ms - at_ms >= age_ms
