"""The connection to the client of one request."""

from starlette.types import Message, Receive, Send

from .http_headers import without_proof
from .request_body import replayed


class Client:
    """One client. `committed`: the application has the request, or the client has part of an answer."""

    def __init__(self, receive: Receive, send: Send, wants_proof: bool) -> None:
        self.receive = receive
        self.committed = False
        self._send = send
        self._wants_proof = wants_proof

    async def send(self, message: Message) -> None:
        """Send to the client, without a proof unless it asked for one."""
        self.committed = True
        if message["type"] == "http.response.start" and not self._wants_proof:
            message = {**message, "headers": without_proof(message.get("headers", ()))}
        await self._send(message)

    def again(self, body: bytes) -> Receive:
        """A `receive` with the request again, with the same or another body, and then with the client's messages."""
        return replayed([{"type": "http.request", "body": body, "more_body": False}], self.receive)

    async def until_gone(self) -> None:
        """Return once the client has left."""
        while (await self.receive())["type"] != "http.disconnect":
            pass
