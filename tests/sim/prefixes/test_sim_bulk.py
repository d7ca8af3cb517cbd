"""The simulated bulk transport: transfers take their time, compete, and end when a host does."""

import random
from collections.abc import Callable
from functools import partial

from hyperspace_vllm.core.records.limits import KV_LINKS_MAX
from hyperspace_vllm.core.records.reason import Reason
from hyperspace_vllm.sim.agenda import Agenda
from hyperspace_vllm.sim.prefixes.sim_bulk import CONNECT_MS, LINK_BYTES_PER_MS, Call, SimBulk
from hyperspace_vllm.sim.sim_network import SimNetwork

BATCH_BYTES = 100 * LINK_BYTES_PER_MS  # 100 ms
BATCHES = 4
SETTLED_MS = 2_000  # links are open
TIMEOUT_MS = 5_000


class Hosts:
    """Host 0 serves batches to the others, and `heard` is what came of their calls: (host, what, when)."""

    def __init__(self, count: int, loss: float = 0.0, admits: Callable[[int, int], bool] = lambda *_: True) -> None:
        self.agenda = Agenda()
        self.network = SimNetwork(self.agenda, random.Random(1), count, 0.0)
        self.bulk = SimBulk(self.agenda, self.network, random.Random(2), loss, admits)
        self.heard: list[tuple[int, str, int]] = []
        for host in range(count):
            self.network.boot(host)
        for host in range(1, count):
            self.bulk.meet(host, frozenset({0}))
        self.agenda.run(SETTLED_MS)

    def ask(self, host: int, batches: int = BATCHES) -> Call:
        def serve(call: Call) -> None:
            for _ in range(batches):
                self.bulk.reply(call, BATCH_BYTES, partial(self.note, host, "batch"))
            self.bulk.reply(call, 100, partial(self.end, host, call))

        return self.bulk.call(host, 0, 100, TIMEOUT_MS, serve, partial(self.failed, host))

    def end(self, host: int, call: Call) -> None:
        self.bulk.end(call)
        self.note(host, "end")

    def note(self, host: int, what: str) -> None:
        self.heard.append((host, what, self.agenda.now_ms))

    def failed(self, host: int, reason: Reason) -> None:
        self.note(host, reason)

    def when(self, host: int, what: str) -> list[int]:
        return [at_ms - SETTLED_MS for who, heard, at_ms in self.heard if (who, heard) == (host, what)]


def test_a_transfer_takes_its_links_time_and_comes_in_order() -> None:
    hosts = Hosts(2)
    hosts.ask(1)
    hosts.agenda.run(10_000)
    assert [what for _, what, _ in hosts.heard] == ["batch"] * BATCHES + ["end"]
    assert 100 * BATCHES <= hosts.when(1, "batch")[-1] <= 100 * BATCHES + 200


def test_two_that_are_served_at_once_take_turns_and_a_small_answer_does_not_wait_for_them() -> None:
    hosts = Hosts(4)
    hosts.ask(1)
    hosts.ask(2)
    hosts.agenda.run(SETTLED_MS + 50)
    hosts.ask(3, batches=0)
    hosts.agenda.run(10_000)
    ends_ms = sorted(hosts.when(host, "batch")[-1] for host in (1, 2))
    assert ends_ms[0] > 150 * (BATCHES - 1)  # they took turns
    assert 200 * BATCHES <= ends_ms[1] < 200 * BATCHES + 200
    assert hosts.when(3, "end")[0] < 50 + 200


def test_what_is_cancelled_is_not_sent() -> None:
    hosts = Hosts(2)
    call = hosts.ask(1)
    hosts.agenda.run(SETTLED_MS + 200)
    hosts.bulk.end(call)
    hosts.agenda.run(10_000)
    assert "end" not in [what for _, what, _ in hosts.heard]
    assert hosts.bulk.payload_bytes < BATCHES * BATCH_BYTES


def test_a_lost_batch_comes_late_and_holds_up_what_follows() -> None:
    hosts = Hosts(2, loss=0.3)
    for _ in range(5):
        hosts.ask(1)
    hosts.agenda.run(20_000)
    times = hosts.when(1, "batch")
    assert times == sorted(times)
    assert (0, 1) in hosts.bulk.disturbed_ms


def test_a_frozen_server_sends_when_it_is_thawed_and_a_dead_one_never() -> None:
    hosts = Hosts(2)
    hosts.network.freeze(0)
    hosts.ask(1)
    hosts.agenda.run(SETTLED_MS + 1_000)
    assert hosts.heard == []
    hosts.network.thaw(0)
    hosts.agenda.run(SETTLED_MS + 2_000)
    assert hosts.when(1, "end")
    hosts.ask(1)
    hosts.network.kill(0, politely=True)
    hosts.bulk.died(0, politely=True)
    hosts.agenda.run(20_000)
    assert len(hosts.when(1, "unreachable")) == 1


def test_calls_to_a_host_that_is_gone_cut_off_or_does_not_admit_the_asker_fail() -> None:
    hosts = Hosts(3, admits=lambda server, asker: asker != 2)
    hosts.ask(2)
    hosts.network.split([0, 1, 0])
    hosts.ask(1)
    hosts.agenda.run(20_000)
    assert len(hosts.when(2, "unreachable")) == 1
    assert hosts.when(2, "unreachable")[0] <= CONNECT_MS + 500
    assert hosts.when(1, "timeout") == [TIMEOUT_MS]


def test_a_host_has_links_to_so_many_and_an_idle_one_makes_room() -> None:
    hosts = Hosts(KV_LINKS_MAX + 3)
    hosts.bulk.meet(0, frozenset(range(1, KV_LINKS_MAX + 3)))
    assert hosts.bulk.links(0) == KV_LINKS_MAX
    hosts.agenda.run(10_000)
    hosts.bulk.call(
        0, KV_LINKS_MAX + 2, 100, TIMEOUT_MS, lambda call: hosts.note(0, "served"), partial(hosts.failed, 0)
    )
    hosts.agenda.run(20_000)
    assert hosts.when(0, "served")
    assert hosts.bulk.links(0) == KV_LINKS_MAX
