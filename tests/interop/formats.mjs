// Hyperspace's records and seals as docs/protocol.md has them, with Node's own crypto. All integers are big-endian.

import {
  createDecipheriv,
  createHash,
  createHmac,
  createPrivateKey,
  createPublicKey,
  hkdfSync,
  sign as signWith,
  verify as verifyWith,
} from "node:crypto";

export const RESPONSE_TOPIC = "hyperspace/cache/announcements";
export const CACHE_PROTOCOL = "/hyperspace/cache/1.0.0";
export const PEERS_PROTOCOL = "/hyperspace/peers/1.0.0";

const RESPONSE_TTL_MS = 24 * 3600 * 1000;
const PEER_RECORD_TTL_MS = 300_000;
const CLOCK_SKEW_MS = 60_000;
const SEAL_TAG_BYTES = 16;

// --- hashes and keys -------------------------------------------------------------------------------

export const sha256 = (...parts) => parts.reduce((hash, part) => hash.update(part), createHash("sha256")).digest();
export const networkId = (name) => sha256("hyperspace/network/1", name);
export const requestHash = (network, requestKey) => sha256("id", network, requestKey);
export const sealKey = (requestKey, network) =>
  Buffer.from(hkdfSync("sha256", requestKey, "", Buffer.concat([Buffer.from("seal"), network]), 32));
export const memberTag = (networkKey, publicKey) =>
  createHmac("sha256", networkKey).update("hyperspace/member/1").update(publicKey).digest();

// --- signatures ------------------------------------------------------------------------------------

const PRIVATE_KEY_HEAD = Buffer.from("302e020100300506032b657004220420", "hex"); // PKCS #8, Ed25519 (RFC 8410)
const PUBLIC_KEY_HEAD = Buffer.from("302a300506032b6570032100", "hex"); // SubjectPublicKeyInfo

/** An Ed25519 key of its 32-byte seed: `{ publicKey, sign(tag, body) }`. */
export function signer(seed) {
  const key = createPrivateKey({ key: Buffer.concat([PRIVATE_KEY_HEAD, seed]), format: "der", type: "pkcs8" });
  const publicKey = createPublicKey(key).export({ format: "der", type: "spki" }).subarray(PUBLIC_KEY_HEAD.length);
  return { publicKey, sign: (tag, body) => signWith(null, Buffer.concat([Buffer.from(tag), body]), key) };
}

function checkSignature(publicKey, tag, body, signature) {
  const key = createPublicKey({ key: Buffer.concat([PUBLIC_KEY_HEAD, publicKey]), format: "der", type: "spki" });
  check(verifyWith(null, Buffer.concat([Buffer.from(tag), body]), key, signature), "bad_signature");
}

// --- PeerRecord ------------------------------------------------------------------------------------

export function encodePeerRecord(record, key) {
  const body = Buffer.concat([
    record.network,
    key.publicKey,
    u64(record.sequence),
    u64(record.expiresAtMs),
    record.memberTag,
    u64(record.capacityBytes ?? 0),
    u16(record.loadPermille ?? 0),
    text(record.address),
    text(record.endpoint ?? ""),
    digests(record.models ?? []),
    digests(record.fingerprints ?? []),
    u16(record.vramDigest?.length ?? 0),
    record.vramDigest ?? Buffer.alloc(0),
  ]);
  return Buffer.concat([body, key.sign("hyperspace/peer-record/1", body)]);
}

/** The record in `raw`, which its author must have signed for this network and which must not have expired. */
export function openPeerRecord(raw, network, nowMs) {
  const reader = new Reader(raw);
  const record = {
    network: reader.take(32),
    publicKey: reader.take(32),
    sequence: reader.u64(),
    expiresAtMs: reader.u64(),
    memberTag: reader.take(32),
    capacityBytes: reader.u64(),
    loadPermille: reader.u16(),
    address: reader.text(),
    endpoint: reader.text(),
    models: reader.digests(),
    fingerprints: reader.digests(),
    vramDigest: reader.take(reader.u16()),
  };
  const signed = reader.read();
  const signature = reader.take(64);
  reader.end();
  check(record.network.equals(network), "other_network");
  check(record.expiresAtMs > nowMs, "expired");
  check(record.expiresAtMs <= nowMs + PEER_RECORD_TTL_MS + CLOCK_SKEW_MS, "from_the_future");
  checkSignature(record.publicKey, "hyperspace/peer-record/1", signed, signature);
  return record;
}

// --- announcement ----------------------------------------------------------------------------------

const KINDS = {
  1: ["response", (reader) => ({ requestHash: reader.take(32), expiresAtMs: reader.u64() })],
  2: [
    "prefix",
    (reader) => ({
      rowId: reader.take(32),
      manifest: reader.take(32),
      commitment: reader.take(48),
      expiresAtMs: reader.u64(),
    }),
  ],
  3: [
    "evidence",
    (reader) => ({
      signer: reader.take(32),
      requestHash: reader.take(32),
      responseHash: reader.take(32),
      proofHash: reader.take(32),
      computedAtMs: reader.u64(),
      signature: reader.take(64),
      tokens: reader.u32(),
      far: reader.u32(),
    }),
  ],
};

/** Whether evidence names a statement that the accused signed. */
export function checkEvidence({ signer, requestHash, responseHash, proofHash, computedAtMs, signature }) {
  const integrity = sha256(requestHash, responseHash, proofHash, u64(computedAtMs));
  checkSignature(signer, "hyperspace/cache-proof/1", integrity, signature);
}

/** The batch in `raw`, which its sender must have signed for this network within the last minute. */
export function openAnnouncement(raw, network, nowMs) {
  const reader = new Reader(raw);
  const batch = { network: reader.take(32), sender: reader.take(32), sequence: reader.u64(), sentAtMs: reader.u64() };
  const kind = reader.take(1)[0];
  check(kind in KINDS, "kind");
  const [name, readEntry] = KINDS[kind];
  batch.kind = name;
  batch.entries = Array.from({ length: reader.u16() }, () => readEntry(reader));
  const signed = reader.read();
  const signature = reader.take(64);
  reader.end();
  check(batch.network.equals(network), "other_network");
  check(Math.abs(batch.sentAtMs - nowMs) <= CLOCK_SKEW_MS, "stale");
  checkSignature(batch.sender, "hyperspace/announcement/1", signed, signature);
  return batch;
}

// --- CacheProof and sealed response ----------------------------------------------------------------

export function decodeProof(raw) {
  const reader = new Reader(raw);
  const proof = {
    requestHash: reader.take(32),
    responseHash: reader.take(32),
    computedAtMs: reader.u64(),
    modelDigest: reader.take(32),
    signer: reader.take(32),
    engineVersion: reader.take(reader.u16()),
    signature: reader.take(64),
  };
  reader.end();
  const { requestHash, responseHash, modelDigest, engineVersion } = proof;
  const at = u64(proof.computedAtMs);
  const tag = "hyperspace/cache-proof/1";
  proof.proofHash = sha256(tag, requestHash, responseHash, at, modelDigest, proof.signer, sha256(engineVersion));
  proof.integrity = sha256(requestHash, responseHash, proof.proofHash, at);
  return proof;
}

/** The body and the proof in a `hit`, or an error that says what doesn't hold. `trusts(signer, memberTag)` decides. */
export function openHit(hit, network, requestKey, modelDigest, trusts, nowMs) {
  const proof = decodeProof(hit.proof);
  check(proof.requestHash.equals(requestHash(network, requestKey)), "wrong_request");
  check(proof.modelDigest.equals(modelDigest), "wrong_model");
  check(proof.computedAtMs <= nowMs + CLOCK_SKEW_MS, "from_the_future");
  check(proof.computedAtMs + RESPONSE_TTL_MS > nowMs, "expired");
  check(trusts(proof.signer, Buffer.from(hit.member)), "untrusted_signer");
  checkSignature(proof.signer, "hyperspace/cache-proof/1", proof.integrity, proof.signature);
  const body = openResponse(sealKey(requestKey, network), hit);
  check(sha256(body).equals(proof.responseHash), "wrong_response");
  return { body, proof };
}

function openResponse(key, { nonce, sealed, proof }) {
  const decipher = createDecipheriv("chacha20-poly1305", key, nonce, { authTagLength: SEAL_TAG_BYTES });
  const end = sealed.length - SEAL_TAG_BYTES;
  check(end >= 0, "bad_seal");
  decipher.setAAD(proof, { plaintextLength: end });
  decipher.setAuthTag(sealed.subarray(end));
  try {
    return Buffer.concat([decipher.update(sealed.subarray(0, end)), decipher.final()]);
  } catch {
    throw new Error("bad_seal");
  }
}

// --- leaves ----------------------------------------------------------------------------------------

function check(holds, what) {
  if (!holds) throw new Error(what);
}

function u64(number) {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64BE(BigInt(number));
  return bytes;
}

function u16(number) {
  const bytes = Buffer.alloc(2);
  bytes.writeUInt16BE(number);
  return bytes;
}

const text = (string) => Buffer.concat([Buffer.from([string.length]), Buffer.from(string, "ascii")]);
const digests = (list) => Buffer.concat([Buffer.from([list.length]), ...list]);

class Reader {
  #raw;
  #at = 0;

  constructor(raw) {
    this.#raw = Buffer.from(raw);
  }

  take(size) {
    check(this.#at + size <= this.#raw.length, "too short");
    this.#at += size;
    return this.#raw.subarray(this.#at - size, this.#at);
  }

  /** Everything taken so far. */
  read() {
    return this.#raw.subarray(0, this.#at);
  }

  end() {
    check(this.#at === this.#raw.length, "too long");
  }

  u64() {
    return Number(this.take(8).readBigUInt64BE());
  }

  u32() {
    return this.take(4).readUInt32BE();
  }

  u16() {
    return this.take(2).readUInt16BE();
  }

  text() {
    return this.take(this.take(1)[0]).toString("ascii");
  }

  digests() {
    return Array.from({ length: this.take(1)[0] }, () => this.take(32));
  }
}
