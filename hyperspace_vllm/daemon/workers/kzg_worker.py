"""The process that runs ckzg, which holds the GIL for up to a quarter of a second (docs/notes/kv-coding.md).

Not multiprocessing: its spawn re-imports the node's main module, and a fixed-size protocol on two pipes is shorter than
its restart handling. The worker says READY once its setup is loaded, then answers each request with one reply, and
ends with its input.

    request = op 1 | blob 131072 | commitment 48 | proof 48        reply = ok 1 | commitment 48 | proof 48
"""

import hashlib
import os
import sys
from importlib.resources import files
from typing import BinaryIO

BLOB_BYTES = 4096 * 32
GROUP_BYTES = 48  # a compressed G1 point
COMMIT, VERIFY = b"c", b"v"
READY = b"r"
REQUEST_BYTES = 1 + BLOB_BYTES + 2 * GROUP_BYTES
REPLY_BYTES = 1 + 2 * GROUP_BYTES
# The public Ethereum ceremony's output, as in the ckzg source distribution.
TRUSTED_SETUP_SHA256 = "d39b9f2d047cc9dca2de58f264b6a09448ccd34db967881a6713eacacf0f26b7"


def main() -> None:
    """Serve requests on stdin until it closes, at least at the niceness given."""
    os.setpriority(os.PRIO_PROCESS, 0, max(int(sys.argv[1]), os.getpriority(os.PRIO_PROCESS, 0)))
    import ckzg

    setup_file = files("hyperspace_vllm") / "data" / "trusted_setup.txt"
    if hashlib.sha256(setup_file.read_bytes()).hexdigest() != TRUSTED_SETUP_SHA256:
        raise SystemExit(f"{setup_file}: not the ceremony's trusted setup (SHA-256 differs)")
    setup = ckzg.load_trusted_setup(str(setup_file), 0)
    _self_test(ckzg, setup)
    try:
        _serve(ckzg, setup, sys.stdin.buffer, sys.stdout.buffer)
    except BrokenPipeError:
        os._exit(0)  # the node has ended; Python would try to flush once more what it did not take


def _self_test(ckzg, setup: object) -> None:  # type: ignore[no-untyped-def]
    """Commit, prove and verify once: the first of each touches memory and code that no request should wait for."""
    blob = b"\0" * (BLOB_BYTES - 1) + b"\1"
    commitment = ckzg.blob_to_kzg_commitment(blob, setup)
    if not _verify(ckzg, blob, commitment, ckzg.compute_blob_kzg_proof(blob, commitment, setup), setup):
        raise SystemExit("ckzg refuses its own proof")


def _serve(ckzg, setup: object, requests: BinaryIO, replies: BinaryIO) -> None:  # type: ignore[no-untyped-def]
    replies.write(READY)
    replies.flush()
    while len(request := requests.read(REQUEST_BYTES)) == REQUEST_BYTES:
        op, blob = request[:1], request[1 : 1 + BLOB_BYTES]
        commitment, proof = request[-2 * GROUP_BYTES : -GROUP_BYTES], request[-GROUP_BYTES:]
        if op == COMMIT:
            ok, commitment = True, ckzg.blob_to_kzg_commitment(blob, setup)
            proof = ckzg.compute_blob_kzg_proof(blob, commitment, setup)
        else:
            ok = _verify(ckzg, blob, commitment, proof, setup)
        replies.write(bytes([ok]) + commitment + proof)
        replies.flush()


def _verify(ckzg, blob: bytes, commitment: bytes, proof: bytes, setup: object) -> bool:  # type: ignore[no-untyped-def]
    try:
        return bool(ckzg.verify_blob_kzg_proof(blob, commitment, proof, setup))
    except RuntimeError:  # what ckzg raises for bytes that are no point of the group
        return False


if __name__ == "__main__":
    main()
