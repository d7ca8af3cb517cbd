"""The private network's cipher is XSalsa20, checked against libsodium's."""

import trio
from libp2p.abc import IRawConnection
from libp2p.io.abc import ReadWriteCloser
from libp2p.network.connection.raw_connection import RawConnection
from nacl.secret import SecretBox

from hyperspace_vllm.daemon.libp2p.libp2p_pnet import NONCE_BYTES, PrivateConnection, hsalsa20, xsalsa20

KEY = bytes(range(32))


class Wire(ReadWriteCloser):
    """A stream that gives what it was written in pieces of at most seven bytes."""

    def __init__(self) -> None:
        self.sent = b""

    async def write(self, data: bytes) -> None:
        self.sent += data

    async def read(self, n: int | None = None) -> bytes:
        size = min(7, n or 7)
        piece, self.sent = self.sent[:size], self.sent[size:]
        return piece

    async def close(self) -> None:
        pass

    def get_remote_address(self) -> tuple[str, int] | None:
        return None


def test_hsalsa20_is_the_papers() -> None:
    """The example of "Cryptography in NaCl", section 8."""
    key = bytes.fromhex("1b27556473e985d462cd51197a9a46c76009549eac6474f206c4ee0844f68389")
    nonce = bytes.fromhex("69696ee955b62b73cd62bda875fc73d6")
    assert hsalsa20(key, nonce).hex() == "dc908dda0b9344a953629b733820778880f3ceb421bb61b91cbd4c3e66256ce4"


def test_xsalsa20_is_libsodiums() -> None:
    message = bytes(1000)
    for number in range(20):
        nonce = bytes([number]) * NONCE_BYTES
        sealed = SecretBox(KEY).encrypt(message, nonce).ciphertext[16:]  # after Poly1305's tag
        assert xsalsa20(KEY, nonce).encrypt(bytes(32) + message)[32:] == sealed  # whose key is the first 32 bytes


def test_what_one_side_writes_the_other_reads_however_it_is_cut() -> None:
    async def exchange() -> bytes:
        wire = Wire()
        sender, receiver = (PrivateConnection(RawConnection(wire, side), KEY.hex()) for side in (True, False))
        await sender.write(b"first, ")
        await sender.write(b"second")
        assert len(wire.sent) == NONCE_BYTES + 13
        assert b"first" not in wire.sent
        got = b""
        while piece := await receiver.read(100):
            got += piece
        return got

    assert trio.run(exchange) == b"first, second"


def test_a_connection_that_ends_within_the_nonce_reads_as_ended() -> None:
    async def read() -> bytes:
        wire = Wire()
        wire.sent = bytes(NONCE_BYTES - 1)
        connection: IRawConnection = PrivateConnection(RawConnection(wire, False), KEY.hex())
        return await connection.read(1)

    assert trio.run(read) == b""
