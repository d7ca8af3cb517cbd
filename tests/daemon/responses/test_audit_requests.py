"""What an API server's audit of another node's response does: to the database, to the signer, and at other nodes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from nacl.signing import SigningKey

from hyperspace_vllm.config import Config
from hyperspace_vllm.core.events.conduct import AnswerAudited
from hyperspace_vllm.core.events.gossip import Publish
from hyperspace_vllm.core.local.response_cache_messages import (
    ResponseAudited,
    ResponseFound,
    ResponseNotFound,
    ResponseToTry,
    StoreResponse,
)
from hyperspace_vllm.core.node.network_part import NetworkPart
from hyperspace_vllm.core.peers.findings import FINDING_EVERY_MS, FINDINGS_MIN
from hyperspace_vllm.core.peers.reputation import score_of
from hyperspace_vllm.core.records.errors import ProtocolViolation
from hyperspace_vllm.core.records.ids import RequestKey, public_key_of, sha256
from hyperspace_vllm.core.records.limits import RESPONSE_TTL_MS, MiB
from hyperspace_vllm.core.response.cache_proof import make_proof, request_hash
from hyperspace_vllm.daemon import clock
from hyperspace_vllm.daemon.identity import Identity as StoredIdentity
from hyperspace_vllm.daemon.metrics import Metrics
from hyperspace_vllm.daemon.node.join import make_trust, node_options
from hyperspace_vllm.daemon.responses.audit_requests import AuditRequests
from hyperspace_vllm.daemon.responses.response_lookups import ResponseLookups
from hyperspace_vllm.daemon.responses.response_store import ResponseStore
from hyperspace_vllm.daemon.responses.store_changes import ServableEntry
from hyperspace_vllm.response_db import ResponseReader, database_path
from tests.support.moments import dated
from tests.support.network_nodes import NetworkedNode, body_of, private_network, request_key
from tests.support.network_shell import NetworkShell
from tests.support.network_world import NETWORK, NOW_MS, Identity, make_node, only
from tests.support.until import until

ME, LIAR, HONEST = range(3)
MODEL = sha256(b"a model")


def key(number: int) -> RequestKey:
    return RequestKey(sha256(b"request", bytes([number])))


def proof_of(number: int, signer: int = LIAR, computed_at_ms: int = NOW_MS) -> bytes:
    who = Identity(signer)
    return make_proof(who.key, NETWORK, key(number), b"{}", MODEL, "vllm", computed_at_ms).encode()


class Node:
    """The parts of a node that an audit concerns, its network core without a network."""

    signing_key: SigningKey = Identity(ME).key  # the store's Signer

    def __init__(self, path: Path) -> None:
        self.now_ms = NOW_MS
        self.path = path
        self.gone: list[bytes] = []
        self.heard_of: list[AnswerAudited] = []
        self.audits_at_ms = NOW_MS
        self.published: list[Publish] = []
        self.network: NetworkPart = make_node(ME, listed=(LIAR, HONEST))
        self.store = ResponseStore(path, 1 << 30, RESPONSE_TTL_MS, self, NETWORK, lambda: self.now_ms)
        self.store.start(self.heard)
        self.metrics = Metrics()
        self.audits = AuditRequests(NETWORK, Identity(ME).public_key, self.store, self.audited, self.metrics)

    def heard(self, stored: tuple[ServableEntry, ...], gone: tuple[bytes, ...]) -> None:
        self.gone.extend(gone)

    def audited(self, event: AnswerAudited) -> bool:
        self.heard_of.append(event)
        self.published += only(self.network.handle(event, dated(self.audits_at_ms)), Publish)
        return self.network._trust.is_convicted(event.evidence.signer, dated(self.audits_at_ms))

    def fetch(self, number: int, signer: int = LIAR, computed_at_ms: int = NOW_MS) -> None:
        """A response came from a peer."""
        proof = proof_of(number, signer, computed_at_ms)
        expires_at_ms = computed_at_ms + RESPONSE_TTL_MS
        assert self.store.store_fetched(key(number), b"{}", proof, computed_at_ms, expires_at_ms, "network")

    def compute(self, number: int) -> None:
        """This node's own engine answered."""
        assert self.store.store(StoreResponse(key(number), "network", MODEL, "vllm", RESPONSE_TTL_MS, b"{}"))

    def audit(self, number: int, far: int, proof: bytes | None = None, tokens: int = 40, source: bytes = b"") -> None:
        self.audits.heard(ResponseAudited(key(number), proof or proof_of(number), tokens, far, source))

    def convict(self, far: int = 2) -> None:
        """Different clients' requests have LIAR caught, over ten minutes."""
        for number in range(FINDINGS_MIN):
            self.audit(number, far, source=b"client %d" % number)
            self.audits_at_ms += FINDING_EVERY_MS

    def held(self) -> list[int]:
        """The responses in the database."""
        assert self.store.flush(60)
        reader = ResponseReader(self.path)
        return [number for number in range(9) if reader.get(key(number), self.now_ms)]

    def trusts(self, number: int) -> bool:
        return self.network._trust.trusts(Identity(number).public_key, dated(NOW_MS))

    def suspects(self, number: int) -> bool:
        return self.network._trust.standings.suspects(Identity(number).public_key, dated(NOW_MS))

    def counted(self) -> dict[str, int]:
        families = self.metrics.audits_total.collect()
        samples = (sample for family in families for sample in family.samples if sample.name.endswith("_total"))
        return {sample.labels["result"]: int(sample.value) for sample in samples}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path / "responses.sqlite")
    yield made
    made.store.close()


def test_a_conviction_takes_away_all_that_its_signer_signed_and_the_trust_in_it(node: Node) -> None:
    for number in range(5):
        node.fetch(number)
    node.fetch(5, HONEST)
    node.compute(6)
    assert node.held() == [*range(7)]
    node.convict()
    assert node.held() == [5, 6]
    assert sorted(node.gone) == sorted(request_hash(NETWORK, key(number)) for number in range(5))
    assert not node.trusts(LIAR)
    assert node.trusts(HONEST)
    assert len(node.published) == 1
    assert node.counted() == {"lie": FINDINGS_MIN}


@pytest.mark.parametrize(("far", "result"), [(1, "dropped"), (40, "lie")])
def test_one_clients_finding_takes_away_that_entry_alone_and_leaves_a_suspicion(
    node: Node, far: int, result: str
) -> None:
    node.fetch(0)
    node.fetch(1)
    for _ in range(10):
        node.audit(0, far)
        node.audits_at_ms += FINDING_EVERY_MS
    assert node.held() == [1]
    assert node.trusts(LIAR)
    assert node.suspects(LIAR)
    assert not node.published
    assert node.counted() == {result: 10}


def test_an_audit_that_is_passed_changes_nothing(node: Node) -> None:
    node.fetch(0)
    node.audit(0, far=0)
    assert node.held() == [0]
    assert not node.suspects(LIAR)
    assert node.counted() == {"passed": 1}


@pytest.mark.parametrize("far", [1, 2])
def test_what_this_node_computed_meanwhile_survives(node: Node, far: int) -> None:
    node.fetch(0)
    node.now_ms += 1
    node.compute(0)
    node.convict(far)
    assert node.held() == [0]
    assert not node.gone


def test_what_another_peer_computed_meanwhile_survives(node: Node) -> None:
    node.fetch(0)
    node.fetch(0, HONEST, NOW_MS + 1)
    node.convict()
    assert node.held() == [0]


def test_an_answer_of_this_nodes_own_that_comes_back_false_is_dropped_and_nobody_blamed(node: Node) -> None:
    node.fetch(0, ME)
    node.fetch(1, ME)
    node.audit(0, far=40, proof=proof_of(0, ME))
    assert node.held() == [1]
    assert not node.heard_of
    assert node.counted() == {"dropped": 1}


@pytest.mark.parametrize(
    ("proof", "tokens"),
    [
        (proof_of(1), 40),
        (proof_of(0)[:-1], 40),
        (proof_of(0)[:-1] + b"\0", 40),
        (proof_of(0, computed_at_ms=NOW_MS + 1)[:-64] + proof_of(0)[-64:], 40),
        (proof_of(0), 1),
    ],
    ids=["another request", "truncated", "bad signature", "another time", "more far tokens than tokens"],
)
def test_an_audit_that_cannot_be_right_breaks_the_protocol(node: Node, proof: bytes, tokens: int) -> None:
    node.fetch(0)
    with pytest.raises(ProtocolViolation):
        node.audit(0, 2, proof, tokens)
    assert node.held() == [0]
    assert not node.heard_of
    assert node.counted() == {}


@pytest.mark.parametrize("p2p_listen", ["", "127.0.0.1:0"], ids=["without libp2p", "before it has joined"])
@pytest.mark.parametrize(("far", "trusted"), [(1, True), (40, False)])
async def test_who_is_caught_is_suspected_or_convicted_without_a_network_too(
    tmp_path: Path, p2p_listen: str, far: int, trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity, liar = StoredIdentity.load(tmp_path), Identity(LIAR)
    config = Config(data_dir=tmp_path, p2p_listen=p2p_listen, peers=(f"{liar.peer}@127.0.0.1:1",))
    metrics = Metrics()
    trust = make_trust(config, identity, None)
    clients = ResponseLookups(lambda route, message: True)
    options, key_pair, listens = node_options(config, None), identity.signing_key, bool(p2p_listen)
    shell = NetworkShell(options, key_pair, trust, clients, None, metrics, config.share, listens)
    audits = AuditRequests(NETWORK, identity.public_key, None, shell.responses.audited, metrics)
    now = clock.now()
    assert trust.trusts(liar.public_key, now)
    for number in range(FINDINGS_MIN):
        later = replace(now, mono_ms=now.mono_ms + number * FINDING_EVERY_MS)
        monkeypatch.setattr(clock, "now", lambda later=later: later)
        audits.heard(ResponseAudited(key(number), proof_of(number), 40, far, bytes([number])))
    now = replace(now, mono_ms=now.mono_ms + FINDINGS_MIN * FINDING_EVERY_MS)
    assert trust.standings.suspects(liar.public_key, now)
    assert trust.trusts(liar.public_key, now) == trusted
    assert (trust.standings.word(liar.peer, now) < score_of(0, 0, 0)) != trusted


# --- node processes -----------------------------------------------------------------------------


@pytest.fixture
def network(tmp_path: Path) -> Iterator[list[NetworkedNode]]:
    nodes = private_network(tmp_path, 3)
    yield nodes
    for each in nodes:
        each.stop()


def found(node: NetworkedNode, name: str) -> ResponseFound:
    """What another node computed; asked for until it has come round that it did."""
    answers: list[ResponseFound | ResponseNotFound | None] = []

    def is_there() -> bool:
        answers.append(node.find(name).answer)
        return isinstance(answers[-1], ResponseFound)

    until(is_there)
    assert isinstance(answers[-1], ResponseFound)
    return answers[-1]


@pytest.mark.io
def test_a_finding_deletes_the_answer_and_has_its_signer_audited_here_and_nowhere_else(
    network: list[NetworkedNode],
) -> None:
    signer, auditor, third = network
    until(lambda: all(node.card().get("p2p") for node in network))
    until(lambda: all(node.status()["p2p"].get("known_peers") == 2 for node in network))
    for name in ("one", "two", "three"):
        signer.store(name)
    false = found(auditor, "one")
    assert not false.suspect
    reader = ResponseReader(database_path(auditor.config.data_dir))
    until(lambda: reader.get(request_key("one"), false.computed_at_ms))

    assert auditor.client.send(ResponseAudited(request_key("one"), false.proof, 40, 2, b"a client"))

    until(lambda: auditor.status()["p2p"]["suspected_peers"] == 1)
    until(lambda: reader.get(request_key("one"), false.computed_at_ms) is None)
    audited = found(auditor, "two")
    assert audited.suspect
    assert audited.body == body_of("two")
    assert public_key_of(audited.computed_by) == public_key_of(signer.card()["peer_id"])
    assert not found(third, "three").suspect
    assert third.status()["p2p"]["suspected_peers"] == 0
    assert not auditor.status()["p2p"]["doubts_own_engine"]
    counted = [each for each in auditor.status()["metrics"] if each["name"] == "hyperspace_audits_total"]
    assert [(each["labels"], each["value"]) for each in counted] == [({"result": "lie"}, 1)]


def to_try(node: NetworkedNode, name: str) -> ResponseToTry:
    """What comes to be audited; never an answer."""

    def is_there() -> bool:
        assert isinstance(node.find(name).answer, ResponseNotFound | None)
        return bool(node.tried)

    until(is_there)
    return node.tried[0]


def open_node(directory: Path, *bootstrap: str) -> NetworkedNode:
    """In a network without a key, where belief can be earned."""
    directory.mkdir(mode=0o700)
    node = NetworkedNode(
        Config(data_dir=directory, kv_cache=False, arena_bytes=MiB, trust="reputation", bootstrap=bootstrap)
    )
    until(lambda: node.card().get("p2p"))
    return node


@pytest.mark.io
def test_a_strangers_answers_are_tried_and_neither_served_nor_stored_until_enough_have_held(tmp_path: Path) -> None:
    node = open_node(tmp_path / "node")
    card = node.card()
    stranger = open_node(tmp_path / "stranger", f"{card['peer_id']}@{card['p2p']}")
    try:
        until(lambda: node.status()["p2p"].get("known_peers") == 1)
        stranger.store("one")
        stranger.store("two")
        tried = to_try(node, "one")
        reader = ResponseReader(database_path(node.config.data_dir))
        for number in range(100):
            assert node.client.send(ResponseAudited(request_key("one"), tried.proof, 40, 0, b"client %d" % number))
        served = found(node, "two")
        assert served.body == body_of("two")
        until(lambda: reader.get(request_key("two"), served.computed_at_ms))
        assert reader.get(request_key("one"), served.computed_at_ms) is None
    finally:
        stranger.stop()
        node.stop()
