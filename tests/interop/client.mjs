// A peer of a Hyperspace network that shares no code with it: joins, hears a response announced, finds its provider in
// the DHT, fetches, opens and verifies it, and prints one JSON object with what it saw.
//
//   node client.mjs '{"bootstrap": "/ip4/127.0.0.1/tcp/4001/p2p/12D3KooW…", "network": "default", "seed": "<64 hex>",
//                     "request_key": "<64 hex>", "model_digest": "<64 hex>", "trusted": ["<signer's key, 64 hex>"],
//                     "network_key": "<64 hex> or null", "deadline_s": 60}'
//
// "joined" on stderr says that it would hear an announcement now.

import { setTimeout as sleep } from "node:timers/promises";

import { noise } from "@chainsafe/libp2p-noise";
import { yamux } from "@chainsafe/libp2p-yamux";
import { generateKeyPairFromSeed } from "@libp2p/crypto/keys";
import { gossipsub } from "@libp2p/gossipsub";
import { identify } from "@libp2p/identify";
import { kadDHT, passthroughMapper } from "@libp2p/kad-dht";
import { ping } from "@libp2p/ping";
import { preSharedKey } from "@libp2p/pnet";
import { tcp } from "@libp2p/tcp";
import { multiaddr } from "@multiformats/multiaddr";
import { createLibp2p } from "libp2p";
import { CID } from "multiformats/cid";
import * as raw from "multiformats/codecs/raw";
import { sha256 as multihash } from "multiformats/hashes/sha2";

import {
  CACHE_PROTOCOL,
  PEERS_PROTOCOL,
  RESPONSE_TOPIC,
  encodePeerRecord,
  memberTag,
  networkId,
  openAnnouncement,
  openHit,
  openPeerRecord,
  requestHash,
  sha256,
  signer,
} from "./formats.mjs";
import { answerPeers, ask } from "./streams.mjs";

const POLL_MS = 50;
const SEARCH_AGAIN_MS = 500;
const SEARCH_MS = 5_000;
const RECORD_MS = 300_000;

const options = JSON.parse(process.argv[2]);
const bytes = (hex) => Buffer.from(hex, "hex");
const hex = (buffer) => Buffer.from(buffer).toString("hex");
const network = networkId(options.network);
const networkKey = options.network_key ? bytes(options.network_key) : null;
const wanted = requestHash(network, bytes(options.request_key));
const key = signer(bytes(options.seed));
const asked = {}; // what others asked of us
const known = new Map(); // peer id -> PeerRecord, verified
const since = performance.now();
const elapsedMs = () => Math.round(performance.now() - since);

setTimeout(() => {
  console.error(`nothing within ${options.deadline_s} s; asked of us: ${JSON.stringify(asked)}`);
  process.exit(1);
}, options.deadline_s * 1000);

const node = await startNode();
await answerPeers(node, ownRecord, meet, asked);
const announced = listen();
const bootstrap = await join();
const joinedMs = elapsedMs();
console.error("joined");

const announcement = await announced;
const announcedAt = performance.now();
const found = await findProviders();
const foundMs = Math.round(performance.now() - announcedAt);
const fetchedAt = performance.now();
const fetched = await fetchFrom(found);
const fetchMs = Math.round(performance.now() - fetchedAt);

console.log(
  JSON.stringify({
    peer: node.peerId.toString(),
    node: process.version,
    bootstrap: bootstrap.toString(),
    announcement,
    providers: found.map(({ id }) => id.toString()),
    ...fetched,
    asked,
    met: [...known.keys()],
    ms: { joined: joinedMs, found: foundMs, fetched: fetchMs },
  }),
);
await node.stop();
process.exit(0);

// --- joining ---------------------------------------------------------------------------------------

async function startNode() {
  return createLibp2p({
    privateKey: await generateKeyPairFromSeed("Ed25519", bytes(options.seed)),
    addresses: { listen: ["/ip4/127.0.0.1/tcp/0"] },
    transports: [tcp()],
    connectionEncrypters: [noise()],
    streamMuxers: [yamux()],
    ...(networkKey && { connectionProtector: preSharedKey({ psk: swarmKey(networkKey) }) }),
    services: {
      identify: identify(),
      ping: ping(),
      dht: kadDHT({ protocol: "/ipfs/kad/1.0.0", clientMode: false, peerInfoMapper: passthroughMapper }),
      pubsub: gossipsub(),
    },
  });
}

function swarmKey(psk) {
  return Buffer.from(`/key/swarm/psk/1.0.0/\n/base16/\n${hex(psk)}`);
}

/** Connect to one node, greet it, and wait until it gossips with us. */
async function join() {
  const connection = await node.dial(multiaddr(options.bootstrap));
  const peer = connection.remotePeer;
  await greet(peer);
  while (!node.services.pubsub.getMeshPeers(RESPONSE_TOPIC).includes(peer.toString())) await sleep(POLL_MS);
  while (node.services.dht.routingTable.size === 0) await sleep(POLL_MS);
  return peer;
}

async function greet(peer) {
  const answer = await ask(node, peer, PEERS_PROTOCOL, { t: "greet", record: ownRecord() });
  if (answer.t !== "greeting") throw new Error(`${peer} answered ${JSON.stringify(answer)}`);
  meet(answer.record, peer);
}

function meet(rawRecord, peer) {
  const record = openPeerRecord(rawRecord, network, Date.now());
  if (!record.publicKey.equals(Buffer.from(peer.publicKey.raw))) throw new Error("not the sender's own record");
  if (networkKey && !record.memberTag.equals(memberTag(networkKey, record.publicKey))) throw new Error("no member");
  known.set(peer.toString(), record);
}

function ownRecord() {
  const port = node.getMultiaddrs()[0].getComponents().find(({ name }) => name === "tcp").value;
  const record = {
    network,
    sequence: Date.now(),
    expiresAtMs: Date.now() + RECORD_MS,
    memberTag: networkKey ? memberTag(networkKey, key.publicKey) : Buffer.alloc(32),
    address: `127.0.0.1:${port}`,
  };
  return encodePeerRecord(record, key);
}

// --- the response ----------------------------------------------------------------------------------

/** The first announcement of what we want, as soon as it comes. */
function listen() {
  return new Promise((resolve, reject) => {
    node.services.pubsub.subscribe(RESPONSE_TOPIC);
    node.services.pubsub.addEventListener("gossipsub:message", ({ detail: { propagationSource, msg } }) => {
      if (msg.topic !== RESPONSE_TOPIC) return;
      try {
        const { sender, sequence, sentAtMs, kind, entries } = openAnnouncement(msg.data, network, Date.now());
        const entry = entries.find((each) => each.requestHash.equals(wanted));
        if (kind !== "response" || !entry) return;
        resolve({
          sender: hex(sender),
          sequence,
          sent_at_ms: sentAtMs,
          expires_at_ms: entry.expiresAtMs,
          entries: entries.length,
          from: msg.from.toString(),
          relay: propagationSource.toString(),
          after_ms: Date.now() - sentAtMs,
        });
      } catch (error) {
        if (error.message !== "kind") reject(error); // a kind that we don't know is of no interest
      }
    });
  });
}

/** Whoever says in the DHT that it has what we want; nodes tell it after they have announced it. */
async function findProviders() {
  const cid = CID.createV1(raw.code, await multihash.digest(Buffer.from(`/cache/${hex(wanted)}`)));
  while (true) {
    const providers = new Map();
    try {
      for await (const found of node.contentRouting.findProviders(cid, { signal: AbortSignal.timeout(SEARCH_MS) })) {
        providers.set(found.id.toString(), found);
      }
    } catch (error) {
      console.error(`searching: ${error.message}`);
    }
    if (providers.size) return [...providers.values()];
    await sleep(SEARCH_AGAIN_MS);
  }
}

/** Ask providers in turn; what the first has that holds. */
async function fetchFrom(providers) {
  for (const { id, multiaddrs } of providers) {
    await node.dial(multiaddrs.length ? multiaddrs : id);
    await greet(id);
    const hit = await ask(node, id, CACHE_PROTOCOL, { t: "query", id: wanted });
    if (hit.t !== "hit") {
      console.error(`${id} answered ${JSON.stringify(hit)}`);
      continue;
    }
    const { body, proof } = openHit(hit, network, bytes(options.request_key), bytes(options.model_digest), trusts, Date.now());
    return {
      from: id.toString(),
      bytes: body.length,
      body_sha256: hex(sha256(body)),
      popularity: hit.popularity,
      proof: {
        signer: hex(proof.signer),
        computed_at_ms: proof.computedAtMs,
        engine_version: proof.engineVersion.toString(),
        integrity: hex(proof.integrity),
      },
    };
  }
  throw new Error("no provider has it");
}

/** Members of a private network show that they are; elsewhere those whom we were told to trust. */
function trusts(publicKey, tag) {
  return networkKey ? tag.equals(memberTag(networkKey, publicKey)) : options.trusted.includes(hex(publicKey));
}
