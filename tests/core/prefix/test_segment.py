"""Segment lengths, the KV fingerprint and the chain of keys, against vectors that any implementation can use."""

import hashlib
import json
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperspace_vllm.core.prefix.segment import (
    chain_seed,
    fingerprint_digest,
    next_key,
    segment_keys,
    segment_tokens,
)
from hyperspace_vllm.core.records.errors import Refused
from hyperspace_vllm.core.records.ids import network_id, row_id, row_key
from tests.support.paths import VECTORS

CASES = json.loads((VECTORS / "segment_keys.json").read_text())
FINGERPRINT = bytes(range(32))


@pytest.mark.parametrize(
    ("blocks", "scheduler", "tokens"),
    [
        ([16], 16, 256),
        ([128], 128, 256),
        ([], 256, 256),
        ([48], 48, 288),
        ([16, 32], 16, 256),
        ([16, 24], 16, 288),
        ([16] * 5, 784, 784),
        ([1024], 16, 1024),
        ([4096], 16, 4096),
    ],
)
def test_a_segment_is_the_least_multiple_of_all_block_sizes_from_256_on(
    blocks: list[int], scheduler: int, tokens: int
) -> None:
    assert segment_tokens(blocks, scheduler) == tokens


@pytest.mark.parametrize(("blocks", "scheduler"), [([4097], 1), ([1000, 999], 16), ([0], 16), ([16], -16)])
def test_block_sizes_without_a_sensible_segment_are_refused(blocks: list[int], scheduler: int) -> None:
    with pytest.raises(Refused, match="segment_tokens"):
        segment_tokens(blocks, scheduler)


@pytest.mark.parametrize("vector", CASES["fingerprints"])
def test_fingerprints_match_the_vectors(vector: dict[str, Any]) -> None:
    assert fingerprint_digest(vector["fields"]).hex() == vector["digest"]


@pytest.mark.parametrize("vector", CASES["chains"], ids=lambda vector: vector["name"])
def test_chains_match_the_vectors(vector: dict[str, Any]) -> None:
    seed = chain_seed(
        bytes.fromhex(vector["fingerprint"]), bytes.fromhex(vector["lora"]), vector["cache_salt"], vector["tenant"]
    )
    tokens = [(vector["first_token"] + i * vector["step"]) % (1 << 32) for i in range(vector["tokens"])]
    items = [(bytes.fromhex(item["hash"]), item["position"]) for item in vector["multimodal"]]
    keys = list(segment_keys(seed, tokens, vector["segment_tokens"], items))
    assert seed.hex() == vector["seed"]
    assert [key.hex() for key in keys] == vector["keys"]
    network = network_id(vector["network"])
    assert [row_id(network, row_key(key, 1, 2)).hex() for key in keys] == vector["row_ids_part_1_rank_2"]


def test_the_chain_is_what_the_protocol_says_in_plain_hashlib() -> None:
    """A slow twin, written from docs/protocol.md."""
    tokens, items = list(range(600)), [(b"image", 300), (b"sound", 511)]
    salt, tenant = "sält", "t"
    h = hashlib.sha256(b"hyperspace/segment-seed/1" + FINGERPRINT)
    for part in (b"lora", salt.encode(), tenant.encode()):
        h.update(len(part).to_bytes(4, "little") + part)
    expected, key = [], h.digest()
    for segment in range(2):
        h = hashlib.sha256(key)
        for token in tokens[segment * 256 : segment * 256 + 256]:
            h.update(token.to_bytes(4, "little"))
        for item, position in items:
            if segment * 256 <= position < segment * 256 + 256:
                h.update(len(item).to_bytes(4, "little") + item + position.to_bytes(8, "little"))
        key = h.digest()
        expected.append(key)
    seed = chain_seed(FINGERPRINT, b"lora", salt, tenant)
    assert list(segment_keys(seed, tokens, 256, items)) == expected


def test_keys_can_be_continued_one_at_a_time() -> None:
    seed, tokens = chain_seed(FINGERPRINT, b"", "", ""), list(range(1024))
    first, second, *_ = segment_keys(seed, tokens, 256)
    assert next_key(seed, tokens[:256]) == first
    assert next_key(first, tokens[256:512]) == second


def test_only_whole_segments_have_keys_and_no_more_than_asked_for() -> None:
    seed = chain_seed(FINGERPRINT, b"", "", "")
    assert len(list(segment_keys(seed, range(511), 256))) == 1
    assert len(list(segment_keys(seed, range(512), 256))) == 2
    assert len(list(segment_keys(seed, range(2048), 256, count=3))) == 3
    assert not list(segment_keys(seed, range(255), 256))


def test_a_token_outside_32_bits_is_an_error() -> None:
    for token in (-1, 1 << 32):
        with pytest.raises(struct.error):
            next_key(bytes(32), [token])


seeds = st.tuples(st.binary(max_size=40), st.text(max_size=20), st.text(max_size=20))


@given(seeds, seeds)
def test_different_adapters_salts_or_tenants_never_share_a_seed(
    one: tuple[bytes, str, str], other: tuple[bytes, str, str]
) -> None:
    assert (chain_seed(FINGERPRINT, *one) == chain_seed(FINGERPRINT, *other)) == (one == other)


@settings(max_examples=50)
@given(st.integers(0, 4 * 8 - 1), st.integers(1, (1 << 32) - 1), st.data())
def test_a_changed_token_changes_its_segments_key_and_all_later_ones_and_no_earlier(
    at: int, change: int, data: st.DataObject
) -> None:
    tokens = data.draw(st.lists(st.integers(0, (1 << 32) - 1), min_size=32, max_size=32))
    changed = [token ^ change if i == at else token for i, token in enumerate(tokens)]
    before, after = (list(segment_keys(bytes(32), t, 8)) for t in (tokens, changed))
    assert [a == b for a, b in zip(before, after, strict=True)] == [i < at // 8 for i in range(4)]


@given(st.permutations(range(16)))
def test_the_order_of_tokens_matters(tokens: list[int]) -> None:
    same = tokens == list(range(16))
    assert (next_key(bytes(32), tokens) == next_key(bytes(32), range(16))) == same


@given(st.lists(st.tuples(st.binary(max_size=8), st.integers(0, 15)), max_size=3, unique_by=lambda item: item[1]))
def test_an_item_changes_the_key_of_the_segment_in_which_it_starts(items: list[tuple[bytes, int]]) -> None:
    plain = list(segment_keys(bytes(32), range(16), 4))
    keys = list(segment_keys(bytes(32), range(16), 4, items))
    first = min((position // 4 for _, position in items), default=4)
    assert [a == b for a, b in zip(plain, keys, strict=True)] == [i < first for i in range(4)]


def test_the_order_of_fields_is_no_part_of_a_fingerprint_and_every_value_is() -> None:
    one = fingerprint_digest({"a": 1, "b": [1, 2], "c": {"x": None, "y": "é"}})
    assert one == fingerprint_digest({"c": {"y": "é", "x": None}, "b": [1, 2], "a": 1})
    others: list[dict[str, object]] = [{"a": 2}, {"b": [2, 1]}, {"c": {"x": 0, "y": "é"}}, {"a": "1"}, {"d": 1}]
    base: dict[str, object] = {"a": 1, "b": [1, 2], "c": {"x": None, "y": "é"}}
    assert len({one, *(fingerprint_digest(base | other) for other in others)}) == 6


def test_a_fingerprint_of_what_is_not_json_is_an_error() -> None:
    for value in (float("nan"), b"bytes", object()):
        with pytest.raises((TypeError, ValueError)):
            fingerprint_digest({"a": value})
