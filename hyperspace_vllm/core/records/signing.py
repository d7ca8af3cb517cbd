"""Ed25519 over `domain tag || canonical bytes`: the only form of signature in the network."""

import hmac
from hashlib import sha256

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from .errors import Refused

SIGNATURE_BYTES = 64
MEMBER_TAG_BYTES = 32
NO_MEMBER_TAG = bytes(MEMBER_TAG_BYTES)


def sign(key: SigningKey, tag: bytes, body: bytes) -> bytes:
    """The 64-byte signature (RFC 8032)."""
    signature: bytes = key.sign(tag + body).signature
    return signature


def verify(public_key: bytes, tag: bytes, body: bytes, signature: bytes) -> None:
    """Raise `Refused("bad_signature")` unless the holder of `public_key` (32 bytes) signed."""
    try:
        VerifyKey(public_key).verify(tag + body, signature)
    except (BadSignatureError, ValueError) as error:  # ValueError: 32 bytes that are no point of the curve
        raise Refused("bad_signature") from error


def member_tag(network_key: bytes, public_key: bytes) -> bytes:
    """HMAC-SHA256(network key, 'hyperspace/member/1' || public key): proves that a holder of the key named this node.

    It travels beside signed records, so that they count as a member's after their signer has left the network.
    """
    return hmac.digest(network_key, b"hyperspace/member/1" + public_key, sha256)
