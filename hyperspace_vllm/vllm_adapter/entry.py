"""The class that vLLM builds: our connector, or one that does nothing where this vLLM isn't as expected.

vLLM builds the connector it was asked for by name or doesn't start: so there is always something to build, and a log
line that says what it is.
"""

import inspect
import logging
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, SupportsHMA

logger = logging.getLogger("vllm.hyperspace")


def difference(connector: type) -> str | None:
    """How vLLM's interface for connectors differs from what `connector` answers; None: it doesn't."""
    unanswered: frozenset[str] = getattr(connector, "__abstractmethods__", frozenset())
    if unanswered:
        return f"it asks for {', '.join(sorted(unanswered))}"
    for interface in (KVConnectorBase_V1, SupportsHMA):
        for name, theirs in vars(interface).items():
            ours = inspect.getattr_static(connector, name)
            if not inspect.isfunction(theirs) or ours is theirs:
                continue
            if list(inspect.signature(theirs).parameters) != list(inspect.signature(ours).parameters):
                return f"it calls {name}{inspect.signature(theirs)}"
    return None


def idle_connector() -> type:
    """A connector that answers every call of this vLLM's interface, whatever its arguments, with nothing."""
    answers: dict[str, Any] = {
        "get_num_new_matched_tokens": (0, False),
        "build_connector_meta": KVConnectorMetadata(),
        "request_finished": (False, None),
        "request_finished_all_groups": (False, None),
    }
    asked = KVConnectorBase_V1.__abstractmethods__ | SupportsHMA.__abstractmethods__
    methods = {name: _answering(answers.get(name)) for name in asked} | {"__module__": __name__}
    return type("HyperspaceConnector", (KVConnectorBase_V1, SupportsHMA), methods)


def _answering(answer: Any) -> Any:
    return lambda *args, **kwargs: answer


def _connector() -> type:
    try:
        from .connector import HyperspaceConnector as ours

        unlike = difference(ours)
    except (ImportError, AttributeError, TypeError) as error:  # what the module needs of vLLM when it is imported
        unlike = str(error)
    if unlike is None:
        return ours
    logger.error("hyperspace: KV sharing (L2) is off, this vLLM isn't as expected: %s", unlike)
    return idle_connector()


HyperspaceConnector = _connector()
hyperspace = HyperspaceConnector  # what kv_connector_module_path looks up, with this module and our short name
