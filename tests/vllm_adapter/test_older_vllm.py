"""older_vllm.py stands in for what the oldest supported vLLM lacks, and for nothing that it has."""

from importlib.metadata import version
from pathlib import Path

import pytest
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.v1.core.sched.output import KVConnectorBlockState
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec

from hyperspace_vllm.vllm_adapter import older_vllm
from tests.support.setup_modules import setup_modules

pytestmark = pytest.mark.feature("the connector's interface")

with setup_modules("releases") as setup:
    OLDEST = setup.releases.RELEASES[0]

# Section -> whether the installed vLLM has the thing itself.
HAS = {
    "CacheHitSource": older_vllm.CacheHitSource.__module__.startswith("vllm."),
    "KVConnectorTransferResults": hasattr(KVConnectorBase_V1, "get_transfer_results"),
    "block_tables": hasattr(KVConnectorBlockState, "get_block_ids"),
    "lies_in_host_memory": "host_resident" in KVCacheGroupSpec.__dataclass_fields__,
    "make_arg_parser": (Path(vllm.__file__).parent / "entrypoints/common/cli_args.py").is_file(),
    "replayed_tokens": hasattr(FullAttentionSpec, "prefix_replay_tokens"),
}


@pytest.mark.skipif(not version("vllm").startswith(OLDEST), reason=f"vLLM {OLDEST} decides")
@pytest.mark.parametrize("section", HAS)
def test_the_oldest_supported_vllm_still_needs_it(section: str) -> None:
    assert not HAS[section], f"vLLM {OLDEST} has it: take {section} out of older_vllm.py"


def test_a_stand_in_is_used_only_where_vllm_lacks_the_thing() -> None:
    assert HAS["KVConnectorTransferResults"] == older_vllm.FAILED_LOADS_HAVE_NAMES
    assert (older_vllm.ConnectorBase is KVConnectorBase_V1) == HAS["KVConnectorTransferResults"]
    assert older_vllm.KVConnectorTransferResults.__module__.startswith("vllm.") == HAS["KVConnectorTransferResults"]
