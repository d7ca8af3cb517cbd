"""What the installed vLLM calls is what our connector has. test_newest_vllm.py asks the same of the newest one."""

import inspect

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA

from hyperspace_vllm.vllm_adapter.connector import HyperspaceConnector

pytestmark = pytest.mark.feature("the connector's interface")


def test_our_overrides_take_what_vllm_passes() -> None:
    for cls in (KVConnectorBase_V1, SupportsHMA):
        for name, member in vars(cls).items():
            ours = vars(HyperspaceConnector).get(name)
            if ours is None or not inspect.isfunction(member):
                continue
            theirs, mine = inspect.signature(member).parameters, inspect.signature(ours).parameters
            assert list(mine) == list(theirs), f"{name}: vLLM passes {list(theirs)}, we take {list(mine)}"


def test_every_abstract_method_is_there() -> None:
    assert not HyperspaceConnector.__abstractmethods__
