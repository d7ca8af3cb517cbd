"""The responses of a simulation: small real bodies, real CacheProofs, and what each host keeps of them."""

from collections import OrderedDict
from dataclasses import dataclass
from hashlib import sha256

from nacl.signing import SigningKey

from ..core.records.ids import NetworkId, RequestKey
from ..core.records.limits import RESPONSE_TTL_MS
from ..core.response.cache_proof import make_proof, request_hash

MODEL_DIGEST = sha256(b"a simulated model").digest()
BODY_BYTES = 64  # repeated 1 to 32 times
KEPT_MAX = 200  # so that hosts evict


def request_key(number: int) -> RequestKey:
    """The key of the `number`th request of the simulation."""
    return RequestKey(sha256(b"request/%d" % number).digest())


def right_body(key: RequestKey) -> bytes:
    """The one right answer; any other answer is a violation."""
    piece = sha256(b"answer/" + key).hexdigest().encode()
    return piece * (1 + key[0] % 32)


@dataclass(frozen=True, slots=True)
class Response:
    """`member` is the member tag of the proof's signer, as it came with the response."""

    key: RequestKey
    request_hash: bytes
    body: bytes
    proof: bytes
    member: bytes
    expires_at_ms: int


def compute(
    signing_key: SigningKey, network: NetworkId, key: RequestKey, body: bytes, member: bytes, computed_at_ms: int
) -> Response:
    """What an engine answers, signed."""
    proof = make_proof(signing_key, network, key, body, MODEL_DIGEST, "sim", computed_at_ms)
    expires_at_ms = computed_at_ms + RESPONSE_TTL_MS
    return Response(key, request_hash(network, key), body, proof.encode(), member, expires_at_ms)


class Shelf:
    """What a host keeps, by request hash; the least recently used goes first."""

    def __init__(self) -> None:
        self._responses: OrderedDict[bytes, Response] = OrderedDict()

    def __len__(self) -> int:
        return len(self._responses)

    def all(self) -> list[Response]:
        """Everything, expired or not."""
        return list(self._responses.values())

    def get(self, wanted: bytes, wall_ms: int) -> Response | None:
        """The response, unless it is not here or has expired."""
        response = self._responses.get(wanted)
        if response is None or response.expires_at_ms <= wall_ms:
            return None
        self._responses.move_to_end(wanted)
        return response

    def expires_at_ms(self, name: bytes) -> int:
        """When the response expires; 0 if it is not here."""
        response = self._responses.get(name)
        return 0 if response is None else response.expires_at_ms

    def put(self, response: Response) -> tuple[bytes, ...]:
        """Keep a response; returns the evicted ones."""
        self._responses[response.request_hash] = response
        self._responses.move_to_end(response.request_hash)
        gone = []
        while len(self._responses) > KEPT_MAX:
            gone.append(self._responses.popitem(last=False)[0])
        return tuple(gone)

    def expire(self, wall_ms: int) -> tuple[bytes, ...]:
        """Drop expired responses."""
        gone = tuple(name for name, response in self._responses.items() if response.expires_at_ms <= wall_ms)
        for name in gone:
            del self._responses[name]
        return gone
