"""The process that runs ckzg, which holds the GIL for up to a quarter of a second (docs/notes/kv-coding.md).

It is ready once its setup is loaded.

    request = op 1 | blob 131072 | commitment 48 | proof 48        reply = ok 1 | commitment 48 | proof 48
"""

import hashlib
from importlib.resources import files

from .worker_frames import lower_priority, next_request, reply, say_ready

BLOB_BYTES = 4096 * 32
GROUP_BYTES = 48  # a compressed G1 point
COMMIT, VERIFY = b"c", b"v"
REPLY_BYTES = 1 + 2 * GROUP_BYTES
# The public Ethereum ceremony's output, as in the ckzg source distribution.
TRUSTED_SETUP_SHA256 = "d39b9f2d047cc9dca2de58f264b6a09448ccd34db967881a6713eacacf0f26b7"


def main() -> None:
    """Serve requests on stdin until it closes."""
    lower_priority()
    import ckzg

    setup_file = files("hyperspace_vllm") / "data" / "trusted_setup.txt"
    if hashlib.sha256(setup_file.read_bytes()).hexdigest() != TRUSTED_SETUP_SHA256:
        raise SystemExit(f"{setup_file}: not the ceremony's trusted setup (SHA-256 differs)")
    setup = ckzg.load_trusted_setup(str(setup_file), 0)
    _self_test(ckzg, setup)
    say_ready()
    while (request := next_request()) is not None:
        reply(_answer(ckzg, setup, request))


def _self_test(ckzg, setup: object) -> None:  # type: ignore[no-untyped-def]
    """Commit, prove and verify once: the first of each touches memory and code that no request should wait for."""
    blob = b"\0" * (BLOB_BYTES - 1) + b"\1"
    commitment = ckzg.blob_to_kzg_commitment(blob, setup)
    if not _verify(ckzg, blob, commitment, ckzg.compute_blob_kzg_proof(blob, commitment, setup), setup):
        raise SystemExit("ckzg refuses its own proof")


def _answer(ckzg, setup: object, request: bytes) -> bytes:  # type: ignore[no-untyped-def]
    op, blob = request[:1], request[1 : 1 + BLOB_BYTES]
    commitment, proof = request[-2 * GROUP_BYTES : -GROUP_BYTES], request[-GROUP_BYTES:]
    if op == COMMIT:
        ok, commitment = True, ckzg.blob_to_kzg_commitment(blob, setup)
        proof = ckzg.compute_blob_kzg_proof(blob, commitment, setup)
    else:
        ok = _verify(ckzg, blob, commitment, proof, setup)
    return bytes([ok]) + commitment + proof


def _verify(ckzg, blob: bytes, commitment: bytes, proof: bytes, setup: object) -> bool:  # type: ignore[no-untyped-def]
    try:
        return bool(ckzg.verify_blob_kzg_proof(blob, commitment, proof, setup))
    except RuntimeError:  # what ckzg raises for bytes that are no point of the group
        return False


if __name__ == "__main__":
    main()
