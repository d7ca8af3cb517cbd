"""Verdicts on signatures, remembered: a hundred simulated nodes check the same bytes with the same key.

A verdict depends only on key, message and signature, so a second check would give the same one. Checks took three
quarters of a run's time.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256

from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

VERDICTS_MAX = 100_000


@contextmanager
def remembered_verdicts() -> Iterator[None]:
    """Inside, PyNaCl's `VerifyKey.verify` remembers its verdicts."""
    plain = VerifyKey.verify

    verdicts: OrderedDict[bytes, bool] = OrderedDict()

    def verify(self: VerifyKey, smessage: bytes, signature: bytes | None = None, encoder: object = None) -> bytes:
        assert signature is not None
        assert encoder is None
        name = sha256(bytes(self) + signature + smessage).digest()
        good = verdicts.get(name)
        if good is None:
            try:
                plain(self, smessage, signature)
                good = True
            except BadSignatureError:
                good = False
            verdicts[name] = good
            if len(verdicts) > VERDICTS_MAX:
                verdicts.popitem(last=False)
        if not good:
            raise BadSignatureError("Signature was forged or corrupt")
        return smessage

    VerifyKey.verify = verify  # type: ignore[method-assign]
    try:
        yield
    finally:
        VerifyKey.verify = plain  # type: ignore[method-assign]
