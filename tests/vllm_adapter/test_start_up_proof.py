"""What is proved before anything is shared: vLLM asks what we answer, and a copy lands where it should."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from hyperspace_vllm.core.records.errors import Refused
from hyperspace_vllm.vllm_adapter.connector import HyperspaceConnector
from hyperspace_vllm.vllm_adapter.copy_proof import prove_copies
from hyperspace_vllm.vllm_adapter.entry import difference, idle_connector
from hyperspace_vllm.vllm_adapter.kv_copy import BlockIds, HostCopier
from hyperspace_vllm.vllm_adapter.kv_layout import KVPlan, LayerSlot, PartPlan
from tests.support.paths import ROOT

BLOCKS, PAGE = 6, 64
PART = PartPlan(0, 16, (LayerSlot("a", 0, PAGE, 0), LayerSlot("b", 1, PAGE, PAGE)), 2 * PAGE)
PLAN = KVPlan(256, 16, (PART,), 1)


class OneTooFar(HostCopier):
    """Puts every block, and finds it, one further on."""

    def gather(self, part: PartPlan, ids: BlockIds, row: memoryview, done: Any) -> None:
        super().gather(part, {group: [block - 1 for block in blocks] for group, blocks in ids.items()}, row, done)

    def scatter(self, part: PartPlan, ids: BlockIds, row: memoryview) -> None:
        super().scatter(part, {group: [block - 1 for block in blocks] for group, blocks in ids.items()}, row)


def shared_memory() -> dict[str, torch.Tensor]:
    """Layers of two groups in one allocation, as vLLM makes them."""
    memory = torch.arange(BLOCKS * PAGE, dtype=torch.int64).to(torch.uint8).view(BLOCKS, PAGE)
    return {"a": memory, "b": memory}


def test_a_copy_that_lands_is_proved_and_leaves_the_cache_as_it_was() -> None:
    views = shared_memory()
    before = views["a"].clone()
    prove_copies(HostCopier(views), PLAN, views, BLOCKS)
    assert torch.equal(views["a"], before)


def test_a_copy_that_lands_elsewhere_is_refused_and_leaves_the_cache_as_it_was() -> None:
    views = shared_memory()
    before = views["a"].clone()
    with pytest.raises(Refused, match="isn't found there"):
        prove_copies(OneTooFar(views), PLAN, views, BLOCKS)
    assert torch.equal(views["a"], before)


def test_the_installed_vllm_asks_what_our_connector_answers() -> None:
    assert difference(HyperspaceConnector) is None


def test_another_argument_is_a_difference() -> None:
    def asked_less(self: object, request: object) -> None: ...

    said = difference(type("Older", (HyperspaceConnector,), {"get_num_new_matched_tokens": asked_less}))
    assert said is not None
    assert said.startswith("it calls get_num_new_matched_tokens(self, request")


def test_the_idle_connector_answers_whatever_vllm_asks() -> None:
    idle = idle_connector()
    assert difference(type("Other", (KVConnectorBase_V1,), {})) is not None
    assert not idle.__abstractmethods__  # type: ignore[attr-defined]
    asked: Any = object.__new__(idle)
    assert asked.get_num_new_matched_tokens("request", 0, more=1) == (0, False)
    assert asked.request_finished_all_groups("request", ()) == (False, None)
    assert asked.wait_for_save() is None


@pytest.mark.io
def test_vllm_gets_an_idle_connector_and_one_line_where_a_name_is_missing() -> None:
    """In a process of its own: the name is gone before anything of ours is loaded."""
    script = """
import vllm.v1.kv_cache_interface
import vllm.distributed.kv_transfer.kv_connector.v1.base
del vllm.v1.kv_cache_interface.group_kernel_blocks
from hyperspace_vllm.vllm_adapter import entry
print(entry.HyperspaceConnector.__module__, entry.HyperspaceConnector.__abstractmethods__)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.stdout.splitlines()[-1:] == ["hyperspace_vllm.vllm_adapter.entry frozenset()"], done.stderr
    said = (done.stdout + done.stderr).splitlines()
    (line,) = (each for each in said if "hyperspace: KV sharing (L2) is off" in each)
    assert "group_kernel_blocks" in line
