"""The one table of reasons: what each says of a peer, and that nothing is refused for a reason that it lacks."""

import re

import pytest

from hyperspace_vllm.core.records.reason import Reason, Severity
from tests.support.paths import ROOT

# Where what peers said is judged: what these raise reaches the core as a peer's failure.
JUDGES = (
    *("core/records/announcement.py", "core/records/manifest.py", "core/records/peer_record.py"),
    *("core/records/registry_delta.py", "core/records/sealing.py", "core/records/signing.py"),
    *("core/response/cache_proof.py", "core/response/sealed_hit.py", "core/peers/membership.py"),
    *("daemon/kv/manifests.py", "daemon/workers/compute_pool.py"),
)
ABOUT_NO_PEER = {"encode_device", "stale"}  # of this node's own encoding; of gossip, which is then ignored


@pytest.mark.parametrize(
    ("label", "severity"),
    [
        ("not_here", Severity.NONE),
        ("miss", Severity.NONE),
        ("untrusted_signer", Severity.NONE),
        ("kzg_worker", Severity.NONE),
        ("busy", Severity.BUSY),
        ("timeout", Severity.FAILURE),
        ("expired", Severity.FAILURE),
        ("protocol", Severity.RUDE),
        ("malformed", Severity.RUDE),
        ("too_large", Severity.LIE),
        ("bad_digest", Severity.LIE),
        ("registry_equivocation", Severity.LIE),
    ],
)
def test_what_a_reason_says_of_a_peer(label: str, severity: Severity) -> None:
    reason = Reason(label)
    assert reason.severity is severity
    assert reason == label, "it is the metric label"
    assert reason.is_lie is (severity is Severity.LIE)
    assert reason.is_guilty is (severity in (Severity.RUDE, Severity.LIE))


def test_there_is_no_reason_that_the_table_lacks() -> None:
    with pytest.raises(ValueError, match="never heard of"):
        Reason("never heard of")


def test_a_failure_weighs_more_than_being_busy_and_less_than_rudeness() -> None:
    weights = [severity.value for severity in (Severity.NONE, Severity.BUSY, Severity.FAILURE, Severity.RUDE)]
    assert weights == [0, 0.25, 1, 10]


@pytest.mark.parametrize("module", JUDGES)
def test_what_peers_are_refused_for_is_in_the_table(module: str) -> None:
    source = (ROOT / "hyperspace_vllm" / module).read_text()
    labels = set(re.findall(r'(?:raise|set_exception\() ?Refused\("([a-z_]+)"', source)) - ABOUT_NO_PEER
    assert labels <= set(Reason), labels - set(Reason)
