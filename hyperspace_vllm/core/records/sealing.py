"""Sealing: what leaves the node is encrypted under a key that only someone with the prompt can derive.

Rows use plain ChaCha20 (RFC 8439; seekable, so a single chunk opens by itself; the signed digests authenticate),
responses ChaCha20-Poly1305. DESIGN §5 says why keys never travel.
"""

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from .ids import NetworkId

NONCE_BYTES = 12


def seal_key(secret: bytes, network: NetworkId) -> bytes:
    """HKDF-SHA256(secret, salt = none, info = 'seal' || network id): 32 bytes. `secret` is a row or request key."""
    return HKDF(SHA256(), 32, None, b"seal" + network).derive(secret)


def xor_stream(key: bytes, nonce: bytes, source: memoryview, target: memoryview, offset: int = 0) -> None:
    """ChaCha20 of `source` into `target` (same length; opening is the same operation).

    `offset` is where `source` starts in the row; a multiple of 64, ChaCha20's block.
    """
    assert offset % 64 == 0
    assert len(nonce) == NONCE_BYTES
    counter_and_nonce = (offset // 64).to_bytes(4, "little") + nonce
    Cipher(ChaCha20(key, counter_and_nonce), mode=None).encryptor().update_into(source, target)
