// Checks tests/vectors/*.json with the client's own code and crypto: what holds, and that nothing altered does.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";

import { decode } from "@msgpack/msgpack";

import {
  checkEvidence,
  decodeProof,
  encodePeerRecord,
  memberTag,
  networkId,
  openAnnouncement,
  openHit,
  openPeerRecord,
  sealKey,
  sha256,
  signer,
} from "./formats.mjs";

const vectors = (name) => [JSON.parse(readFileSync(new URL(`../vectors/${name}.json`, import.meta.url)))].flat();
const bytes = (hex) => Buffer.from(hex, "hex");
const hex = (raw) => Buffer.from(raw).toString("hex");
const anybody = () => true;

const CHECKS = {
  cache_proof(vector) {
    const proof = decodeProof(bytes(vector.proof));
    assert.equal(hex(proof.proofHash), vector.proof_hash);
    assert.equal(hex(proof.integrity), vector.integrity);
    assert.equal(hex(proof.responseHash), hex(sha256(vector.body)));
    assert.equal(hex(proof.signer), hex(signer(bytes(vector.signing_seed)).publicKey));
    assert.equal(proof.engineVersion.toString(), vector.engine_version);
    assert.equal(proof.computedAtMs, vector.computed_at_ms);
    assert.equal(hex(signer(bytes(vector.signing_seed)).sign("hyperspace/cache-proof/1", proof.integrity)), hex(proof.signature));
  },

  sealed_response(vector) {
    const frame = bytes(vector.frame);
    assert.equal(frame.readUInt32BE(), frame.length - 4);
    const hit = decode(frame.subarray(4));
    assert.equal(hit.t, "hit");
    assert.equal(hit.popularity, vector.popularity);
    for (const name of ["nonce", "sealed", "proof", "member"]) assert.equal(hex(hit[name]), vector[name]);
    assert.equal(hex(memberTag(bytes(vector.network_key), bytes(vector.signer))), vector.member);

    const network = networkId(vector.network);
    const key = bytes(vector.request_key);
    assert.equal(hex(sealKey(key, network)), vector.seal_key);
    const open = (altered) =>
      openHit({ ...hit, ...altered }, network, key, bytes(vector.model_digest), anybody, vector.now_ms);
    const { body, proof } = open({});
    assert.equal(hex(body), vector.body);
    assert.equal(hex(proof.signer), vector.signer);
    for (const name of ["nonce", "sealed", "proof"]) refusesEveryFlip(hit[name], (raw) => open({ [name]: raw }));
    const later = vector.expires_at_ms;
    assert.throws(() => openHit(hit, network, key, bytes(vector.model_digest), anybody, later), { message: "expired" });
  },

  announcement(vector) {
    const raw = bytes(vector.announcement);
    const open = (each, nowMs) => openAnnouncement(each, networkId(vector.network), nowMs);
    const batch = open(raw, vector.sent_at_ms);
    assert.equal(hex(batch.sender), hex(signer(bytes(vector.signing_seed)).publicKey));
    assert.equal(batch.sequence, vector.sequence);
    assert.equal(vector.topic.includes("kv-prefix"), batch.kind === "prefix");
    const shown = batch.entries.map((entry) => Object.values(entry).map((value) => (value instanceof Buffer ? hex(value) : value)));
    assert.deepEqual(shown, vector.entries.map((entry) => Object.values(entry)));
    if (batch.kind === "evidence") {
      batch.entries.forEach(checkEvidence);
      assert.throws(() => checkEvidence({ ...batch.entries[0], computedAtMs: batch.entries[0].computedAtMs + 1 }));
    }
    refusesEveryFlip(raw, (each) => open(each, vector.sent_at_ms));
    assert.throws(() => open(raw, vector.sent_at_ms + 60_001), { message: "stale" });
  },

  peer_record(vector) {
    const raw = bytes(vector.record);
    const open = (each, nowMs) => openPeerRecord(each, networkId(vector.network), nowMs);
    const record = open(raw, vector.expires_at_ms - 1);
    for (const name of ["sequence", "address", "endpoint"]) assert.equal(record[name], vector[name]);
    assert.equal(hex(record.memberTag), vector.member_tag);
    assert.deepEqual(record.models.map(hex), vector.models);
    assert.equal(hex(encodePeerRecord(record, signer(bytes(vector.signing_seed)))), vector.record);
    refusesEveryFlip(raw, (each) => open(each, vector.expires_at_ms - 1));
    assert.throws(() => open(raw, vector.expires_at_ms), { message: "expired" });
  },
};

function refusesEveryFlip(raw, open) {
  for (let at = 0; at < raw.length; at += 1) {
    const altered = Buffer.from(raw);
    altered[at] ^= 1;
    assert.throws(() => open(altered), undefined, `byte ${at} altered`);
  }
}

const checked = {};
for (const [name, holds] of Object.entries(CHECKS)) {
  const all = vectors(name);
  all.forEach(holds);
  checked[name] = all.length;
}
console.log(JSON.stringify(checked));
