"""Whom a node knew when it last ran."""

import json
from pathlib import Path

import pytest
from nacl.signing import SigningKey

from hyperspace_vllm.core.records.ids import PeerId, peer_id
from hyperspace_vllm.daemon.node.address_book import ADDRESSES_MAX, AddressBook

OWN = "10.0.0.1:7791"


def peer_at(port: int) -> tuple[PeerId, str]:
    return peer_id(SigningKey.generate().verify_key.encode()), f"10.0.0.2:{port}"


def test_who_was_of_use_is_read_again(tmp_path: Path) -> None:
    peers = [peer_at(port) for port in (1, 2)]
    book = AddressBook(tmp_path)
    book.note(peers)
    assert AddressBook(tmp_path).read(OWN) == tuple(peers)


def test_being_alone_forgets_nobody_and_the_last_word_is_written_at_the_end(tmp_path: Path) -> None:
    first, second = peer_at(1), peer_at(2)
    book = AddressBook(tmp_path)
    book.note([first])
    book.note([first, second])  # within ten seconds
    book.note([])
    assert len(AddressBook(tmp_path).read(OWN)) == 1
    book.close()
    assert len(AddressBook(tmp_path).read(OWN)) == 2


def test_only_so_many_are_remembered(tmp_path: Path) -> None:
    AddressBook(tmp_path).note([peer_at(port) for port in range(1, 2 * ADDRESSES_MAX)])
    assert len(AddressBook(tmp_path).read(OWN)) == ADDRESSES_MAX


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        json.dumps({"12D3KooW": "10.0.0.2:1"}),
        json.dumps({peer_at(1)[0]: "127.0.0.1:1"}),
        json.dumps({peer_at(1)[0]: ["10.0.0.2:1"]}),
        json.dumps({peer_at(1)[0]: "a name:1"}),
    ],
)
def test_what_does_not_parse_or_may_not_be_dialled_is_left_out(tmp_path: Path, content: str) -> None:
    (tmp_path / "peers.json").write_text(content)
    assert AddressBook(tmp_path).read(OWN) == ()


def test_without_a_file_nobody_is_known_and_a_full_disk_is_no_error(tmp_path: Path) -> None:
    book = AddressBook(tmp_path / "none")
    assert book.read(OWN) == ()
    book.note([peer_at(1)])
    book.close()
