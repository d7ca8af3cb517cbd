"""The private network's cipher as libp2p specifies it (specs/pnet): XSalsa20 under the network key, below everything.

    each side   nonce 24 || XSalsa20(network key, nonce) of everything it sends

py-libp2p 0.8.1 uses Salsa20 with a nonce of 8 bytes, which no other libp2p speaks. XSalsa20 is Salsa20 under a key that
HSalsa20 derives from the nonce's first 16 bytes; PyNaCl doesn't expose libsodium's, hence the rounds below: 0.13 ms per
connection and direction.
"""

import os
import struct

from Crypto.Cipher import Salsa20
from libp2p.network.connection.raw_connection import RawConnection

NONCE_BYTES = 24
_CONSTANTS = struct.unpack("<4I", b"expand 32-byte k")
_WORD = 0xFFFFFFFF
# Indices of a quarter round's four words: the columns, then the rows, of the 4 x 4 state.
_QUARTERS = (
    *((0, 4, 8, 12), (5, 9, 13, 1), (10, 14, 2, 6), (15, 3, 7, 11)),
    *((0, 1, 2, 3), (5, 6, 7, 4), (10, 11, 8, 9), (15, 12, 13, 14)),
)


class PrivateConnection(RawConnection):
    """A TCP connection that only holders of the network key can read (64 hex digits, as in py-libp2p)."""

    def __init__(self, conn: RawConnection, psk: str) -> None:
        super().__init__(conn.stream, conn.is_initiator)
        self._network_key = bytes.fromhex(psk)
        self._encrypt: Salsa20.Salsa20Cipher | None = None
        self._decrypt: Salsa20.Salsa20Cipher | None = None

    async def write(self, data: bytes) -> None:
        """Encrypt and send, the nonce first."""
        if self._encrypt is None:
            nonce = os.urandom(NONCE_BYTES)
            self._encrypt = xsalsa20(self._network_key, nonce)
            await super().write(nonce + self._encrypt.encrypt(data))
        else:
            await super().write(self._encrypt.encrypt(data))

    async def read(self, n: int | None = None) -> bytes:
        """Up to `n` decrypted bytes; b'' at the end."""
        if self._decrypt is None:
            nonce = b""
            while len(nonce) < NONCE_BYTES:
                piece = await super().read(NONCE_BYTES - len(nonce))
                if not piece:
                    return b""
                nonce += piece
            self._decrypt = xsalsa20(self._network_key, nonce)
        return self._decrypt.decrypt(await super().read(n))


def xsalsa20(key: bytes, nonce: bytes) -> Salsa20.Salsa20Cipher:
    """The stream cipher under a key of 32 bytes and a nonce of 24."""
    return Salsa20.new(hsalsa20(key, nonce[:16]), nonce[16:])


def hsalsa20(key: bytes, nonce: bytes) -> bytes:
    """The 32-byte key derived from another and 16 bytes of nonce (Bernstein, "Extending the Salsa20 nonce", 2011)."""
    k, n = struct.unpack("<8I", key), struct.unpack("<4I", nonce)
    c = _CONSTANTS
    x = [c[0], *k[:4], c[1], *n, c[2], *k[4:], c[3]]
    for _ in range(10):
        for w0, w1, w2, w3 in _QUARTERS:
            x[w1] ^= _rotated(x[w0] + x[w3], 7)
            x[w2] ^= _rotated(x[w1] + x[w0], 9)
            x[w3] ^= _rotated(x[w2] + x[w1], 13)
            x[w0] ^= _rotated(x[w3] + x[w2], 18)
    return struct.pack("<8I", x[0], x[5], x[10], x[15], *x[6:10])


def _rotated(word: int, bits: int) -> int:
    word &= _WORD
    return (word << bits | word >> (32 - bits)) & _WORD
