"""This node's identity: one Ed25519 key in <data_dir>/node.key, and the CURVE key derived from it.

Choice: the CURVE (X25519) key is the Ed25519 key mapped to the other form of the same curve, so a peer id alone pins
the key of an encrypted connection and no certificate has to be exchanged. Rejected: a second, random key in a signed
record, which a static list of peers would have to carry beside each id. Cost: one secret serves two algorithms, which
libsodium's documentation allows and Signal has done since 2013.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import nacl.exceptions
from nacl.signing import SigningKey, VerifyKey
from zmq.utils import z85

from ..core.records.errors import ProtocolViolation
from ..core.records.ids import PeerId, peer_id, public_key_of
from ..regular_files import remove_drafts
from .start_error import StartError

_SEED_BYTES = 32


class IdentityError(StartError):
    """The key file can't be used; the message says what to do."""


@dataclass(frozen=True)
class Identity:
    """A node's keys; `curve_*` are Z85 text (40 bytes) as ZeroMQ takes them."""

    signing_key: SigningKey
    public_key: bytes
    peer_id: PeerId
    curve_public: bytes
    curve_secret: bytes

    @classmethod
    def load(cls, data_dir: Path) -> "Identity":
        """The identity in <data_dir>/node.key, created on first use; `IdentityError` if it is unsafe or damaged."""
        signing_key = SigningKey(_read_or_create(data_dir / "node.key"))
        public_key = signing_key.verify_key.encode()
        return cls(
            signing_key,
            public_key,
            peer_id(public_key),
            z85.encode(signing_key.verify_key.to_curve25519_public_key().encode()),
            z85.encode(signing_key.to_curve25519_private_key().encode()),
        )


def curve_public_of(peer: str) -> bytes:
    """The CURVE public key (Z85) of the node with this peer id; `ProtocolViolation` if the id names none."""
    try:
        curve = VerifyKey(public_key_of(peer)).to_curve25519_public_key()
    except (nacl.exceptions.CryptoError, ValueError) as error:
        if isinstance(error, ProtocolViolation):
            raise
        raise ProtocolViolation(f"peer id {peer!r}: expected a point of the curve") from error
    return z85.encode(curve.encode())


def _read_or_create(path: Path) -> bytes:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    remove_drafts(path.parent, f".{path.name}.*")
    try:
        return _read(path)
    except FileNotFoundError:
        _create(path)
        return _read(path)


def _read(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise IdentityError(
                f"{path} can be read by others (mode {stat.S_IMODE(status.st_mode):04o}, owner {status.st_uid}): "
                f"if it has not been copied, run `chmod 600 {path}`; otherwise delete it to become a new node"
            )
        seed = os.read(descriptor, _SEED_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(seed) != _SEED_BYTES:
        raise IdentityError(f"{path} holds {len(seed)} bytes, expected 32: delete it to become a new node")
    return seed


def _create(path: Path) -> None:
    # Written whole under another name, then linked: a reader never sees half a key, and of two
    # processes that create it at once one wins and both read the winner's.
    draft = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, os.urandom(_SEED_BYTES))
        os.fsync(descriptor)
        os.link(draft, path)
    except FileExistsError:
        return
    finally:
        os.close(descriptor)
        os.unlink(draft)
