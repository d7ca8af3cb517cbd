"""A session: one process of this host that has sent Hello, keeps its lease by heartbeats, and reports its part."""

from dataclasses import dataclass, field
from typing import Literal

from ...core.records.errors import ProtocolViolation
from ...core.records.layout import Layout


@dataclass(slots=True)
class Session:
    """A client's own statements, and the end of its lease."""

    route: bytes  # the ROUTER's name of its connection
    key: bytes
    role: Literal["api", "scheduler", "worker", "cli"]
    name: str
    expires_at: float
    layout: Layout | None = None
    engine: str = ""  # the name that an engine's scheduler and workers share
    owed: dict[int, int] = field(default_factory=dict)  # row bytes -> slabs asked for that didn't fit

    def registered_layout(self) -> Layout:
        """Its layout; `ProtocolViolation` without one."""
        if self.layout is None:
            raise ProtocolViolation("layout: register it first")
        return self.layout

    def known_engine(self) -> str:
        """Its engine; `ProtocolViolation` without one."""
        if not self.engine:
            raise ProtocolViolation("engine: register it first")
        return self.engine
