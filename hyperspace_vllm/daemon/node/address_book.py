"""Whom this node knew when it last ran, in <data_dir>/peers.json: with its bootstrap down it still finds the others.

Addresses only, of peers that were of use. Nobody is trusted for standing there, and what doesn't parse is left out.
"""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from ...core.peers.address import may_dial
from ...core.records.errors import ProtocolViolation
from ...core.records.ids import PeerId, public_key_of
from ...core.records.limits import KiB
from ...regular_files import read_regular

ADDRESSES_MAX = 64
WRITE_EVERY_S = 10.0
_FILE_BYTES_MAX = 64 * KiB

log = logging.getLogger(__name__)


class AddressBook:
    """Writes at most every ten seconds; what came since then is written by `close`."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "peers.json"
        self._addresses: dict[str, str] = {}
        self._written: dict[str, str] = {}
        self._write_at_s = 0.0

    def read(self, own_address: str) -> tuple[tuple[PeerId, str], ...]:
        """The addresses that may be dialled from `own_address`."""
        try:
            found = json.loads(read_regular(self._path, _FILE_BYTES_MAX))
        except (OSError, ValueError, RecursionError):
            return ()
        if not isinstance(found, dict):
            return ()
        usable = [(PeerId(peer), address) for peer, address in found.items() if _is_usable(peer, address, own_address)]
        return tuple(usable[:ADDRESSES_MAX])

    def note(self, usable: Sequence[tuple[PeerId, str]]) -> None:
        """The peers that are of use now, where they may be dialled; none is no reason to forget those who were."""
        if usable:
            self._addresses = dict(usable[:ADDRESSES_MAX])
        if time.monotonic() >= self._write_at_s:
            self.close()

    def close(self) -> None:
        """Write what isn't written yet."""
        if self._addresses == self._written:
            return
        self._write_at_s = time.monotonic() + WRITE_EVERY_S
        draft = self._path.with_suffix(".json.new")
        try:
            draft.write_text(json.dumps(self._addresses))
            draft.replace(self._path)
        except OSError as error:  # a full disk: the bootstrap list is still there
            log.info("addresses not written: %s", error)
            return
        self._written = self._addresses


def _is_usable(peer: object, address: object, own_address: str) -> bool:
    if not isinstance(peer, str) or not isinstance(address, str) or not may_dial(address, own_address, None):
        return False
    try:
        public_key_of(peer)
    except ProtocolViolation:
        return False
    return True
