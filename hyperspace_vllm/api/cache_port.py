"""Ports: what checks, audits and embeddings use of the response cache, on behalf of one request."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from starlette.types import Receive, Scope, Send

from ..core.local.similar_messages import Question
from ..core.records.ids import RequestKey
from ..response_db import StoredResponse
from .client_end import Client
from .naming import Naming
from .options import ApiMessage
from .request_facts import RequestFacts
from .stored_answer import StoredAnswer

T = TypeVar("T")


class CachePort(Protocol):
    """The part of the cache that checks and audits use, on behalf of one request."""

    @property
    def facts(self) -> RequestFacts:
        """The request."""

    @property
    def naming(self) -> Naming:
        """The naming of its answers."""

    @property
    def source(self) -> bytes:
        """The request's source, as audits count sources."""

    async def engine(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application behind the cache."""

    async def read(self, work: Callable[[], T]) -> T:
        """The result of `work` on the request, off the event loop if that is large; raises `Busy`."""

    async def read_found(self, size: int, work: Callable[[], T]) -> T:
        """The same for other data of `size` bytes."""

    async def read_computed(self, size: int, work: Callable[[], T]) -> T:
        """The same for the engine's answer: it waits for its turn however long the queue is."""

    def for_engine(self, body: dict[str, Any]) -> bytes:
        """A request of the cache on behalf of the client: signed and salted like the client's own."""

    def hand_over(self, key: RequestKey, body: bytes, question: Question | None = None) -> str:
        """Give an answer to the node, and keep it until the database has it; "sent" or "dropped"."""

    def forget(self, key: RequestKey) -> None:
        """Stop serving an answer that is kept until the database has it."""

    def tell_node(self, message: ApiMessage) -> bool:
        """Queue a message for the node; False when it was dropped."""


class InputsPort(CachePort, Protocol):
    """The part of the cache that embeddings use as well, whose inputs are looked up and computed one by one."""

    @property
    def client(self) -> Client:
        """The client of the request."""

    @property
    def has_node(self) -> bool:
        """Whether a node is there to store anything."""

    @property
    def read_deadline_s(self) -> float:
        """For the database."""

    def now_ms(self) -> int:
        """Milliseconds since 1970."""

    async def is_refused(self) -> bool:
        """Whether the server itself refuses the request."""

    async def entry(self, key: RequestKey, now_ms: int) -> StoredResponse | None:
        """The entry of `key` in the database, or on its way there."""

    async def write(self, size: int, work: Callable[[], T]) -> T:
        """The result of `work` on `size` bytes; on the event loop if the threads are too busy."""

    def has_room(self, answer: StoredAnswer) -> bool:
        """Whether there is room for an answer while its client reads it."""

    def touch(self, key: RequestKey) -> None:
        """Note that the entry of `key` was served."""

    def count_lookup(self, result: str, reason: str) -> None:
        """Count the request, once."""

    def count_stored(self, result: str) -> None:
        """Count the result of storing a computed answer."""
