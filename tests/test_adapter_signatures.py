"""vLLM's connector interface is ours to follow: an upgrade that changes it fails here, with the difference."""

import difflib
import inspect
from pathlib import Path

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA

from hyperspace_vllm.vllm_adapter.connector import HyperspaceConnector

SNAPSHOT = Path(__file__).parent / "vectors" / "kv_connector_interface.txt"


def interface(cls: type) -> list[str]:
    """One line per public member: its parameters' names, kinds and defaults (annotations vary, meaning doesn't)."""
    lines = []
    for name, member in sorted(vars(cls).items()):
        if name.startswith("_") and name != "__init__":
            continue
        if isinstance(member, property):
            lines.append(f"{name} (property)")
        elif callable(function := getattr(member, "__func__", member)):
            parameters = inspect.signature(function).parameters.values()
            lines.append(f"{name}({', '.join(str(p.replace(annotation=p.empty)) for p in parameters)})")
    return lines


def test_the_interface_of_the_installed_vllm_is_the_one_we_were_written_for() -> None:
    installed = [*interface(KVConnectorBase_V1), *interface(SupportsHMA)]
    known = SNAPSHOT.read_text().splitlines()
    difference = "\n".join(difflib.unified_diff(known, installed, "supported vLLM", "installed vLLM", lineterm=""))
    assert not difference, f"vLLM's KV connector interface changed; read what is new, then update it:\n{difference}"


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
