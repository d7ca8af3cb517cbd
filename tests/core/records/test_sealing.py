"""ChaCha20 as rows use it, against RFC 8439."""

import pytest

from hyperspace_vllm.core.records.sealing import xor_stream
from tests.support import other_threads

SUNSCREEN = (
    b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
    b"sunscreen would be it."
)


@pytest.mark.parametrize(
    ("key", "nonce", "block", "plaintext", "sealed"),
    [
        # Section 2.4.2, which starts at block 1.
        (
            bytes(range(32)).hex(),
            "000000000000004a00000000",
            1,
            SUNSCREEN,
            "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0bf91b65c5524733ab8f593dabcd62b357"
            "1639d624e65152ab8f530c359f0861d807ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab7793736"
            "5af90bbf74a35be6b40b8eedf2785e42874d",
        ),
        # Appendix A.1, vectors 1 and 2: the key stream.
        (
            bytes(32).hex(),
            bytes(12).hex(),
            0,
            bytes(64),
            "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
            "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
        ),
        (
            bytes(32).hex(),
            bytes(12).hex(),
            1,
            bytes(64),
            "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
            "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
        ),
    ],
)
def test_rows_are_sealed_as_rfc_8439_says(key: str, nonce: str, block: int, plaintext: bytes, sealed: str) -> None:
    target = bytearray(len(plaintext))
    xor_stream(bytes.fromhex(key), bytes.fromhex(nonce), memoryview(plaintext), memoryview(target), 64 * block)
    assert target.hex() == sealed


def test_other_threads_run_while_a_row_is_sealed() -> None:
    row, target = memoryview(bytes(1 << 27)), memoryview(bytearray(1 << 27))
    assert other_threads.run_during(lambda: xor_stream(bytes(32), bytes(12), row, target))
