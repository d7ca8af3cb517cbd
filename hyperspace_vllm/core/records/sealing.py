"""Sealing: data that leaves the node is encrypted under a key that only a node with the prompt can derive.

Rows use plain ChaCha20 (RFC 8439; seekable, so a single chunk opens by itself; the signed digests authenticate, and
`row_tag` shows that their signer had the prompt), responses ChaCha20-Poly1305. docs/design.md explains why keys never
travel.

Both derive their key by the same HKDF, but no row and response share a key: row keys and request keys are SHA-256
outputs under different tags ('hyperspace/row/2', 'hyperspace/request/3'), so an equal pair is a collision, and without
the prompt neither can be told from a random key. Every node seals its answer to one request under the same key; random
nonces of 96 bits keep them apart (a repeat is expected after 2⁴⁸ answers to that request).

Context: rows are 4 to 128 MiB. Choice: ChaCha20 is `cryptography`'s (OpenSSL's vector code): 6.0-6.6 GB/s of one core.
Rejected, measured in the same run: our own C++, 1.0-1.1 times that with AVX-512 and 0.4 with AVX2; sealing in the
erasure code's pass, 0.8-1.0 times sealing before it. Cost: `cryptography` before 50 holds the GIL while it seals.
"""

import hmac
from hashlib import sha256

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from .errors import Refused
from .ids import NetworkId, RequestKey, RowKey

NONCE_BYTES = 12
SEAL_TAG_BYTES = 16  # appended by ChaCha20-Poly1305
ROW_TAG_BYTES = 16


def seal_key(secret: bytes, network: NetworkId) -> bytes:
    """HKDF-SHA256(secret, salt = none, info = 'seal' || network id): 32 bytes. `secret` is a row or request key."""
    return HKDF(SHA256(), 32, None, b"seal" + network).derive(secret)


def row_tag(row_key: RowKey, network: NetworkId, statement: bytes) -> bytes:
    """16 bytes that only a node with the row's prompt can make: HMAC-SHA256 of `statement`, truncated.

    Its key is HKDF-SHA256(row key, salt = none, info = 'row tag' || network id), and so not the one that seals.
    """
    key = HKDF(SHA256(), 32, None, b"row tag" + network).derive(row_key)
    return hmac.digest(key, statement, sha256)[:ROW_TAG_BYTES]


def seal_response(secret: RequestKey, network: NetworkId, nonce: bytes, body: bytes, associated: bytes) -> bytes:
    """`body` encrypted and, with the encoded CacheProof in `associated`, authenticated: 16 bytes longer.

    `nonce` is 12 random bytes, never used again.
    """
    assert len(nonce) == NONCE_BYTES
    return ChaCha20Poly1305(seal_key(secret, network)).encrypt(nonce, body, associated)


def open_response(secret: RequestKey, network: NetworkId, nonce: bytes, sealed: bytes, associated: bytes) -> bytes:
    """The body in `sealed`; `Refused("bad_seal")` unless it was sealed with `secret` and `associated`."""
    assert len(nonce) == NONCE_BYTES
    try:
        return ChaCha20Poly1305(seal_key(secret, network)).decrypt(nonce, sealed, associated)
    except InvalidTag as error:
        raise Refused("bad_seal") from error


def xor_stream(key: bytes, nonce: bytes, source: memoryview, target: memoryview, offset: int = 0) -> None:
    """ChaCha20 of `source` into `target` (same length; opening is the same operation).

    `offset` is where `source` starts in the row; a multiple of 64, ChaCha20's block.
    """
    assert offset % 64 == 0
    assert len(nonce) == NONCE_BYTES
    counter_and_nonce = (offset // 64).to_bytes(4, "little") + nonce
    Cipher(ChaCha20(key, counter_and_nonce), mode=None).encryptor().update_into(source, target)
