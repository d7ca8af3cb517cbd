"""Verdicts on signatures, remembered: a hundred simulated nodes check the same bytes with the same key.

A verdict depends on key, message and signature alone, so a remembered one is what another check would say. Three
quarters of a run's time went into them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

VERDICTS_MAX = 100_000


@contextmanager
def remembered_verdicts() -> Iterator[None]:
    """Within, PyNaCl's `VerifyKey.verify` remembers what it said."""
    plain = VerifyKey.verify

    @lru_cache(VERDICTS_MAX)
    def is_good(key: bytes, message: bytes, signature: bytes) -> bool:
        try:
            plain(VerifyKey(key), message, signature)
        except BadSignatureError:
            return False
        return True

    def verify(self: VerifyKey, smessage: bytes, signature: bytes | None = None, encoder: object = None) -> bytes:
        assert signature is not None
        assert encoder is None
        if not is_good(bytes(self), bytes(smessage), signature):
            raise BadSignatureError("Signature was forged or corrupt")
        return smessage

    VerifyKey.verify = verify  # type: ignore[method-assign]
    try:
        yield
    finally:
        VerifyKey.verify = plain  # type: ignore[method-assign]
