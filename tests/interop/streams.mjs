// Requests and answers on libp2p streams: length u32 big-endian ‖ msgpack map with the message's name under "t".

import { byteStream } from "@libp2p/utils";
import { decode, encode } from "@msgpack/msgpack";

import { CACHE_PROTOCOL, PEERS_PROTOCOL } from "./formats.mjs";

const FRAME_BYTES_MAX = 8 * 1024 * 1024 + 64 * 1024;
const REQUEST_MS = 5_000;

/** Ask a peer one thing on a stream of its own. */
export async function ask(node, peer, protocol, request) {
  const signal = AbortSignal.timeout(REQUEST_MS);
  const stream = await node.dialProtocol(peer, protocol, { signal });
  const bytes = byteStream(stream, { maxBufferSize: FRAME_BYTES_MAX });
  await bytes.write(frame(request), { signal });
  const answer = await read(bytes, { signal });
  await stream.close({ signal });
  return answer;
}

/** Answer what peers ask, as a node that has nothing. `greeted(record)` hears records; `counts` what was asked. */
export async function answerPeers(node, ownRecord, greeted, counts) {
  const answers = {
    greet: ({ record }, peer) => {
      greeted(record, peer);
      return { t: "greeting", record: ownRecord() };
    },
    ping: () => ({ t: "pong" }),
    "peers?": () => ({ t: "peers", records: [] }),
    "deltas?": () => ({ t: "deltas", deltas: [], heads: [], more: false }),
    query: () => ({ t: "miss", reason: "unknown" }),
  };

  async function serve(stream, connection) {
    const bytes = byteStream(stream, { maxBufferSize: FRAME_BYTES_MAX });
    try {
      while (true) {
        const request = await read(bytes);
        counts[request.t] = (counts[request.t] ?? 0) + 1;
        await bytes.write(frame(answers[request.t](request, connection.remotePeer)));
      }
    } catch (error) {
      stream.abort(error); // the peer has closed it, or sent what we don't know
    }
  }

  await node.handle([CACHE_PROTOCOL, PEERS_PROTOCOL], serve);
}

function frame(message) {
  const payload = encode(message);
  const length = Buffer.alloc(4);
  length.writeUInt32BE(payload.length);
  return Buffer.concat([length, payload]);
}

async function read(bytes, options) {
  const length = Buffer.from((await bytes.read({ ...options, bytes: 4 })).subarray()).readUInt32BE();
  if (length === 0) throw new Error("busy");
  if (length > FRAME_BYTES_MAX) throw new Error(`a frame of ${length} bytes`);
  return decode((await bytes.read({ ...options, bytes: length })).subarray());
}
