"""Every bound in one place, each with its sum; the asserts relate them to each other."""

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB

# --- erasure code (docs/notes/kv-coding.md) -------------------------------------------------------------------
DATA_CHUNKS = 32
TOTAL_CHUNKS = 64
CHUNK_ALIGN_BYTES = 256  # chunk sizes are odd multiples: power-of-two strides halve the coding speed

# --- rows and objects ---------------------------------------------------------------------------
SEGMENT_TOKENS_MIN = 256
SEGMENT_TOKENS_MAX = 4096  # longer ones are seldom whole; 16 x the least
ROW_BYTES_MAX = 128 * MiB  # 256 tokens x <= 512 KiB a token, all layers of one part of one rank
CHUNK_BYTES_MAX = ROW_BYTES_MAX // DATA_CHUNKS + CHUNK_ALIGN_BYTES * 2  # + rounding to an odd multiple
OBJECT_ROWS_MAX = 32  # 32 rows x 2 field elements = the 64 elements of one EIP-7594 cell
DIGEST_BYTES = 32
DIGEST_TABLE_BYTES_MAX = OBJECT_ROWS_MAX * TOTAL_CHUNKS * DIGEST_BYTES  # 64 KiB, 128 KiB as field elements
MANIFEST_BYTES_MAX = 512 + OBJECT_ROWS_MAX * (32 + 8 + 1 + 32 + 16)

# --- what one request may ask for ---------------------------------------------------------------
PROMPT_SEGMENTS_MAX = 4096  # 1 Mi tokens in segments of 256
PARTS_MAX = 16  # distinct attention reaches of a model
RANKS_MAX = 64
LOOKUP_ROWS_MAX = 8192  # rows one prefix lookup may name: 4096 segments x 2 parts
RESPONSE_BYTES_MAX = 8 * MiB
CACHE_PROOF_BYTES_MAX = 512  # 202 B and an engine version of at most 256

# --- the response cache -------------------------------------------------------------------------
REQUEST_BYTES_MAX = 4 * MiB  # a longer request body bypasses the response cache unread
INLINE_BODY_BYTES = 32 * KiB  # read on the event loop: 8 ms at worst (messages of one letter), usually 0.3 ms
USUAL_BODY_BYTES = 512 * KiB  # a prompt of 128,000 tokens; larger ones have a queue of their own
LARGE_BODIES_BYTES_MAX = 8 * REQUEST_BYTES_MAX  # in the queue of one thread, x 0.4 s: the last one's deadline is over
FLIGHTS_MAX = 1024  # computations that other requests may join; the next ones run alone
FLIGHT_BYTES_MAX = 8 * MiB  # frames a computation keeps for clients that join late or read slowly
FLIGHTS_BYTES_MAX = 256 * MiB  # all of them together: 1024 answers of 256 KiB
FLIGHT_WINDOW_BYTES = 64 * KiB  # how far a computation may run ahead of its fastest reader
REQUEST_LEASES_MAX = 4096  # requests of a host being computed; FLIGHTS_MAX for each of four API servers
REPLAY_BYTES_MAX = 32 * MiB  # frames of one hit: 4 x an answer, in which one-word choices grow the most; longer: a miss
SENDING_BYTES_MAX = 256 * MiB  # of all hits while clients read them; hits over 64 KiB beyond that are misses
RECENT_BYTES_MAX = 32 * MiB  # answers in transit to the database, kept by the API server that sent them
RECENT_MS = 5_000
AUDIT_TOKENS_MAX = 4096  # prompt and answer: their log-probabilities are 0.4 MiB of JSON, made on vLLM's event loop
QUESTION_CHARS_MAX = 4 * KiB  # 256 words of at most 16 characters, nearly three times the usual
SIMILAR_LOOKUPS_MAX = 64  # questions of one node waiting to be embedded, x 5 ms: the deadline of the last one is over
STORE_QUEUE_BYTES_MAX = 64 * MiB  # responses waiting for the one writer

# --- sockets ------------------------------------------------------------------------------------
LOCAL_MESSAGE_BYTES_MAX = RESPONSE_BYTES_MAX + 64 * KiB  # a body, its proof and names of at most 1 KiB each
PEER_CONTROL_BYTES_MAX = 1 * MiB  # 8192 row ids x 32 B = 256 KiB, manifest + digests = 70 KiB
PEER_MESSAGE_BYTES_MAX = CHUNK_BYTES_MAX + 4 * KiB
PEER_REQUESTS_MAX = 64  # requests one peer may have open here; more are answered `busy`
PEER_BYTES_IN_FLIGHT_MAX = 32 * MiB  # of chunks that one peer has requested and not received
PEERS_BYTES_IN_FLIGHT_MAX = 256 * MiB  # of all peers; beyond it each has one chunk
KV_REQUEST_BYTES_HELD_MAX = 2 * PEER_CONTROL_BYTES_MAX  # of unfinished requests, per connection
KV_REPLY_BYTES_HELD_MAX = 2 * PEER_MESSAGE_BYTES_MAX  # of unfinished replies, per link: one arrives, one is read
KV_CONNECTIONS_MAX = 48  # inbound; all together hold 48 x 2 MiB = 96 MiB of requests
KV_HANDSHAKES_MAX = 16  # inbound, whose peer isn't proved yet; 1 KiB each
KV_LINKS_MAX = 32  # outbound, to discovered peers; all together hold 32 x 8 MiB = 256 MiB of replies
CLIENTS_MAX = 256
LOOKUPS_PER_CLIENT_MAX = 1024
METRICS_CONNECTIONS_MAX, METRICS_DEADLINE_S = 8, 5.0  # of the node's own /metrics; a scrape takes milliseconds
RESPONSE_LOOKUPS_MAX = 256  # unfinished ones of one API server; the requests beyond compute at once

REDIS_REPLY_BYTES_MAX = RESPONSE_BYTES_MAX + 128 * KiB  # of one command; a response as a peer would send it, and a bit
REDIS_REPLY_ITEMS_MAX = 256  # a request is for 64 peers of one id

# --- file descriptors, of the 1,024 that a process usually may have --------------------------------
KV_CONNECTION_DESCRIPTORS = 4  # TCP, both ends of the Unix socket, ZeroMQ's mailbox
PEER_CONNECTIONS_MAX = 64  # libp2p's
PEER_CONNECTIONS_INBOUND_MAX = 48  # the rest is for peers that this node chose
PEER_HANDSHAKES_MAX = 32  # inbound, whose peer isn't proved yet
GREETED_INBOUND_MAX = 38
UNGREETED_INBOUND_MAX = 6  # of a peer that was admitted and has not sent its record yet
OWN_DESCRIPTORS = 176  # databases, arena, chunk files being read, pipes of worker processes, DHT, logs

# --- discovery, gossip and registry -------------------------------------------------------------
PEER_RECORD_BYTES_MAX = 8 * KiB  # 2 x 16 digests of 32 B, a VRAM digest of 4 KiB and about 700 B of the rest
PEERS_KNOWN_MAX = 1024  # 10 KiB each with its record: 10 MiB
PEERS_OF_SOURCE_MAX = PEERS_KNOWN_MAX // 4  # that connected from one host, or that such peers reported
PEX_RECORDS_MAX = 64
PEX_OF_SOURCE_MAX = 32  # peers met at one host that a node passes on
ANNOUNCEMENT_ENTRIES_MAX = 256  # 120 B each: 30 KiB, half of a GossipSub message's usual bound
EVIDENCE_ENTRIES_MAX = 8  # each has a signature to check, 0.1 ms
GOSSIP_OF_AUTHOR_PER_S = 40  # messages; ten batches a second on two topics, of 4 KiB
GOSSIP_OF_SOURCE_PER_S = 100  # of all authors of one host: 1.8 ms each, a fifth of a core
GOSSIP_OF_ALL_PER_S = 300
GOSSIP_KIB_A_MESSAGE = 4  # larger ones count as several
GOSSIP_INVALID_BURST = 20  # invalid messages on one link, which is then closed: 4 ms of checking
GOSSIP_INVALID_PER_S = 0.1
DIALS_BURST_S = 8  # every dial budget may be saved up for this long
DIALS_OF_PEER_PER_S = 1.0  # in one peer's name, to any address
DIALS_TO_HOST_PER_S = 1.0  # to one host, of peers that weren't met there
DIALS_PER_S = 4.0  # to all such hosts
DIALS_OWN_TO_HOST_PER_S = 8.0  # to peers at one host where they were met
DIALS_OWN_PER_S = 32.0
DIALS_COUNTED_MAX = 1024  # peers, and hosts, whose dials are counted
REGISTRY_OWNERS_MAX = PEERS_KNOWN_MAX
REGISTRY_OWNERS_OF_SOURCE_MAX = PEERS_OF_SOURCE_MAX
REGISTRY_ENTRIES_MAX = 20_000  # of one owner
REGISTRY_DELTA_BYTES_MAX = 1536 * KiB  # a snapshot of 20,000 entries of about 70 B
REGISTRY_REPLY_BYTES_MAX = 2 * MiB  # deltas in one answer
REGISTRY_CHANGES_MAX = 1024  # of one update: 75 B each, 75 KiB
REGISTRY_LOG_DELTAS_MAX = 1024  # since a snapshot; an owner compacts at three quarters
REGISTRY_LOG_BYTES_MAX = 3 * REGISTRY_DELTA_BYTES_MAX  # a snapshot, as much in updates, and what arrives meanwhile
REGISTRY_LOGS_BYTES_MAX = 64 * MiB  # of all owners
REGISTRY_LOGS_BYTES_OF_SOURCE_MAX = REGISTRY_LOGS_BYTES_MAX // 4
REGISTRY_INDEX_MAX = 200_000  # entries of all owners: 50 MiB in the node
REGISTRY_INDEX_OF_SOURCE_MAX = REGISTRY_INDEX_MAX // 4
REGISTRY_IMPORTS_MAX = 8  # in progress
REGISTRY_DELTAS_AT_ONCE = 64  # checked in one turn: 5 ms of the node's loop
REGISTRY_DELTAS_PER_S = 1_000  # of all neighbours: 7 % of the loop
WORKER_MS_PER_S = 250  # of the registry worker's time, for the documents of one host
WORKER_BURST_MS = 5_000  # saved up: 250 documents of 500 entries
WORKER_LOST_MS = 2_000  # extra cost of a lost worker: until it is noticed, and all documents are imported again
WORKER_LOST_TWICE_MS = (
    20_000  # cost to its host of a document that the registry worker does not survive: a minute without imports
)
STREAM_FRAME_BYTES_MAX = RESPONSE_BYTES_MAX + 64 * KiB
VRAM_SEGMENTS_MAX = 8192  # 2 Mi tokens in segments of 256; a digest of 4 KiB has 4 bits for each then
RESPONSE_HINTS_MAX = 100_000  # pairs of an id and a provider that a node remembers from gossip: 40 MiB
PROVIDERS_MAX = 8  # of one response

# --- time ---------------------------------------------------------------------------------------
HEARTBEAT_MS = 1_000
LEASE_MS = 5_000
EMBEDDED_LINGER_MS = 10_000
CLOCK_SKEW_MS = 60_000
FETCH_STALL_MS = 250  # behind the least rate that is progress, hedging included
FETCH_BYTES_PER_MS_MIN = 250  # 2 Mbit/s: that rate, where no end of the fetch demands a higher one
FETCH_UNKNOWN_MS = 2_000  # a whole fetch, where no prefill has been measured yet
FETCH_PREFILL_SHARE = 0.5  # a fetch never takes longer than this share of the prefill it saves
UNHINTED_PREFILL_SHARE = 0.05  # looking for unannounced providers
RESPONSE_TTL_MS = 24 * 3600 * 1000
PEER_RECORD_TTL_MS = 300_000  # renewed every minute
PEER_RECORD_AGAIN_MS = 5_000  # between two renewals, however much changes
REGISTRY_TTL_MS = RESPONSE_TTL_MS
REGISTRY_WRITE_MS = 250  # between two writes of a node's own document
REGISTRY_COMPACT_MS = 5_000  # between two of its epochs; 20 updates of 75 KiB = 1.5 MiB
REGISTRY_EPOCH_MS = 2_000  # between two epochs of an owner that other nodes accept

assert CHUNK_BYTES_MAX < PEER_MESSAGE_BYTES_MAX
assert (
    KV_CONNECTION_DESCRIPTORS * (KV_CONNECTIONS_MAX + KV_HANDSHAKES_MAX + KV_LINKS_MAX)
    + PEER_CONNECTIONS_MAX
    + PEER_HANDSHAKES_MAX
    + CLIENTS_MAX
    + OWN_DESCRIPTORS
    < 1024
)
assert GREETED_INBOUND_MAX + UNGREETED_INBOUND_MAX + 4 <= PEER_CONNECTIONS_INBOUND_MAX  # 4 are being judged
assert LOOKUP_ROWS_MAX * DIGEST_BYTES < PEER_CONTROL_BYTES_MAX
assert DIGEST_TABLE_BYTES_MAX + MANIFEST_BYTES_MAX < PEER_CONTROL_BYTES_MAX
assert LEASE_MS >= 3 * HEARTBEAT_MS
assert RESPONSE_BYTES_MAX + CACHE_PROOF_BYTES_MAX + 4 * KiB < LOCAL_MESSAGE_BYTES_MAX
assert STREAM_FRAME_BYTES_MAX + 1 + KiB < REDIS_REPLY_BYTES_MAX
assert RESPONSE_LOOKUPS_MAX <= LOOKUPS_PER_CLIENT_MAX
assert RESPONSE_BYTES_MAX < REPLAY_BYTES_MAX < SENDING_BYTES_MAX
assert FLIGHT_WINDOW_BYTES < FLIGHT_BYTES_MAX < FLIGHTS_BYTES_MAX
assert REGISTRY_ENTRIES_MAX * 76 < REGISTRY_DELTA_BYTES_MAX  # measured: 75.2 B an entry
assert REGISTRY_EPOCH_MS < REGISTRY_COMPACT_MS
assert REGISTRY_DELTA_BYTES_MAX < REGISTRY_REPLY_BYTES_MAX < STREAM_FRAME_BYTES_MAX
assert GOSSIP_OF_AUTHOR_PER_S < GOSSIP_OF_SOURCE_PER_S < GOSSIP_OF_ALL_PER_S / 2  # peers known only by hearsay get half
assert DIALS_COUNTED_MAX > 8 * (DIALS_PER_S + DIALS_OWN_PER_S)  # none is forgotten while it is spent
assert REGISTRY_LOG_BYTES_MAX < REGISTRY_LOGS_BYTES_OF_SOURCE_MAX
assert REGISTRY_ENTRIES_MAX < REGISTRY_INDEX_OF_SOURCE_MAX
assert min(STORE_QUEUE_BYTES_MAX, RECENT_BYTES_MAX) >= RESPONSE_BYTES_MAX
