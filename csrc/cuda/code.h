// Encoding and decoding of a row, a tile of 1,024 columns at a time, 32 rows of it in shared memory.
//
// A lane holds 32 bytes of a row as bit planes: 16 at its number and 16 half a tile further, so that each
// load and store of a warp is 512 contiguous bytes. Four warps share the butterflies as the CPU's passes do
// (cpu/kernels_body.h): layers 0-1 in groups of 4 neighbouring rows, layers 2-4 in groups of 8 rows 4 apart.
#pragma once

#include "bit_planes.h"
#include "chacha20.h"
#include "hyperspace/reed_solomon.h"
#include "paged.h"

namespace hyperspace::cuda {

using reed_solomon::kDataChunks;
using reed_solomon::kTotalChunks;

inline constexpr int kLanes = 32, kWarps = 4;
inline constexpr int kTileBytes = 1024;  // of each row
inline constexpr int kTilePieces = kTileBytes / 16;

// One row's tile. A lane's two pieces stay its own from phase to phase, as key stream or planes.
struct Tile {
    Piece piece[32][kTilePieces];

    // A lane writes 64 bytes of key stream and reads 16: exchanging pieces spreads both over all banks.
    HYPERSPACE_INLINE static uint32_t slot(uint32_t piece) { return piece ^ (piece >> 3 & 3); }

    HYPERSPACE_INLINE Planes planes(uint32_t row, uint32_t lane) const {
        const Piece &first = piece[row][slot(lane)], &second = piece[row][slot(lane + kLanes)];
        Planes planes;
        HYPERSPACE_UNROLL for (int i = 0; i < 4; ++i) {
            planes.bit[i] = first.word[i], planes.bit[i + 4] = second.word[i];
        }
        return planes;
    }
    HYPERSPACE_INLINE void put(uint32_t row, uint32_t lane, const Planes& planes) {
        Piece first, second;
        HYPERSPACE_UNROLL for (int i = 0; i < 4; ++i) {
            first.word[i] = planes.bit[i], second.word[i] = planes.bit[i + 4];
        }
        piece[row][slot(lane)] = first;
        piece[row][slot(lane + kLanes)] = second;
    }
};

// The key stream for the tile's sealed data: a warp's own 8 rows, two of them at a time.
HYPERSPACE_INLINE void fill_key_stream(const SealKey& seal, uint32_t chunk_bytes, uint32_t row_bytes,
                                       Tile& tile, uint32_t at, uint32_t warp, uint32_t lane) {
    HYPERSPACE_ROLL for (uint32_t pair = 0; pair < 4; ++pair) {
        const uint32_t row = 8 * warp + 2 * pair + lane / 16, block = lane % 16;
        const uint32_t column = at + 64 * block, offset = row * chunk_bytes + column;
        if (column >= chunk_bytes || offset >= row_bytes) continue;
        Piece stream[4];
        key_stream(seal, offset / 64, stream);
        HYPERSPACE_UNROLL for (uint32_t q = 0; q < 4; ++q) tile.piece[row][Tile::slot(4 * block + q)] =
            stream[q];
    }
}

// `piece`, of the row's bytes from `offset` on, with key stream where the row has bytes: padding is not
// sealed.
HYPERSPACE_INLINE Piece sealed(const Piece& piece, const Piece& stream, uint32_t offset, uint32_t row_bytes) {
    Piece out;
    HYPERSPACE_UNROLL for (uint32_t w = 0; w < 4; ++w) out.word[w] = piece.word[w] ^ stream.word[w];
    HYPERSPACE_USUALLY(offset + 16 <= row_bytes);
    if (offset + 16 <= row_bytes) return out;
    HYPERSPACE_UNROLL for (uint32_t w = 0; w < 4; ++w) {
        const uint32_t start = offset + 4 * w;
        const uint32_t bytes = start < row_bytes ? row_bytes - start : 0;
        if (bytes < 4) out.word[w] &= (1u << 8 * bytes) - 1;
    }
    return out;
}

template <int Coset>
HYPERSPACE_INLINE void interpolate_group(uint32_t group, Planes (&r)[4]) {
    switch (group) {  // uniform in a warp; each case has its own constants
        case 0:
            return interpolate<BitPlanes, Coset, 0, 0>(r);
        case 1:
            return interpolate<BitPlanes, Coset, 0, 4>(r);
        case 2:
            return interpolate<BitPlanes, Coset, 0, 8>(r);
        case 3:
            return interpolate<BitPlanes, Coset, 0, 12>(r);
        case 4:
            return interpolate<BitPlanes, Coset, 0, 16>(r);
        case 5:
            return interpolate<BitPlanes, Coset, 0, 20>(r);
        case 6:
            return interpolate<BitPlanes, Coset, 0, 24>(r);
        default:
            return interpolate<BitPlanes, Coset, 0, 28>(r);
    }
}

template <int Coset>
HYPERSPACE_INLINE void evaluate_group(uint32_t group, Planes (&r)[4]) {
    switch (group) {
        case 0:
            return evaluate<BitPlanes, Coset, 0, 0>(r);
        case 1:
            return evaluate<BitPlanes, Coset, 0, 4>(r);
        case 2:
            return evaluate<BitPlanes, Coset, 0, 8>(r);
        case 3:
            return evaluate<BitPlanes, Coset, 0, 12>(r);
        case 4:
            return evaluate<BitPlanes, Coset, 0, 16>(r);
        case 5:
            return evaluate<BitPlanes, Coset, 0, 20>(r);
        case 6:
            return evaluate<BitPlanes, Coset, 0, 24>(r);
        default:
            return evaluate<BitPlanes, Coset, 0, 28>(r);
    }
}

// ---- Gather, seal and encode: the cache is read once, 64 chunks are written.

struct EncodeParams {
    PagedRow paged;      // aligned; only its row_bytes count if `row` is set
    const uint8_t* row;  // contiguous row, 16-byte aligned; perhaps where the data chunks go
    SealKey seal;
    uint32_t chunk_bytes;  // a multiple of 256
    uint8_t* chunks;       // 64, one after the other, 16-byte aligned
};

struct Encode {
    using Params = EncodeParams;
    using Shared = Tile;
    static constexpr int kThreads = kWarps * kLanes, kPhases = 4, kBlocksPerSm = 4;

    static uint32_t blocks(const Params& p) { return (p.chunk_bytes + kTileBytes - 1) / kTileBytes; }

    template <int Phase>
    HYPERSPACE_INLINE static void run(const Params& p, Shared& tile, uint32_t block, uint32_t thread) {
        const uint32_t at = block * kTileBytes, warp = thread / kLanes, lane = thread % kLanes;
        if constexpr (Phase == 0) {
            fill_key_stream(p.seal, p.chunk_bytes, p.paged.row_bytes, tile, at, warp, lane);
        } else if constexpr (Phase == 1) {
            HYPERSPACE_ROLL for (uint32_t half = 0; half < 2; ++half)
                load_group(p, tile, at, 2 * warp + half, lane);
        } else if constexpr (Phase == 2) {
            middle_layers(tile, warp, lane);
        } else {
            HYPERSPACE_ROLL for (uint32_t half = 0; half < 2; ++half)
                store_group(p, tile, at, 2 * warp + half, lane);
        }
    }

    HYPERSPACE_INLINE static void load_group(const Params& p, Tile& tile, uint32_t at, uint32_t group,
                                             uint32_t lane) {
        Piece piece[4][2];
        HYPERSPACE_UNROLL for (int i = 0; i < 4; ++i) load_row(p, at, 4 * group + i, lane, piece[i]);
        Planes r[4];
        HYPERSPACE_UNROLL for (int i = 0; i < 4; ++i) {
            const uint32_t row = 4 * group + i;
            HYPERSPACE_UNROLL for (uint32_t half = 0; half < 2; ++half) {
                const uint32_t number = lane + half * kLanes, column = at + 16 * number;
                const uint32_t offset = row * p.chunk_bytes + column;
                piece[i][half] =
                    sealed(piece[i][half], tile.piece[row][Tile::slot(number)], offset, p.paged.row_bytes);
                if (column < p.chunk_bytes) store_piece(p.chunks + offset, piece[i][half]);
            }
            r[i] = to_planes(piece[i][0], piece[i][1]);
        }
        interpolate_group<0>(group, r);
        HYPERSPACE_UNROLL for (int i = 0; i < 4; ++i) tile.put(4 * group + i, lane, r[i]);
    }

    // A lane's two pieces of a row's tile. Usually the tile is in one run, and is located once.
    HYPERSPACE_INLINE static void load_row(const Params& p, uint32_t at, uint32_t row, uint32_t lane,
                                           Piece (&piece)[2]) {
        const uint32_t start = row * p.chunk_bytes + at;
        const uint32_t left_of_row = start < p.paged.row_bytes ? p.paged.row_bytes - start : 0;
        const uint32_t left_of_chunk = p.chunk_bytes - at;
        const uint32_t left = left_of_row < left_of_chunk ? left_of_row : left_of_chunk;
        HYPERSPACE_USUALLY(!p.row);
        Place place = {};
        if (left != 0)
            place = p.row ? Place{const_cast<uint8_t*>(p.row) + start, left} : locate(p.paged, start);
        const bool one_run = place.left >= (left < kTileBytes ? left : kTileBytes);
        HYPERSPACE_USUALLY(one_run && left >= kTileBytes);
        HYPERSPACE_UNROLL for (uint32_t half = 0; half < 2; ++half) {
            const uint32_t from = 16 * (lane + half * kLanes);
            piece[half] = {};
            if (from >= left) continue;
            const uint8_t* bytes = one_run ? place.bytes : locate(p.paged, start + from).bytes;
            if (bytes) piece[half] = load_piece(one_run ? bytes + from : bytes);
        }
    }

    HYPERSPACE_INLINE static void middle_layers(Tile& tile, uint32_t warp, uint32_t lane) {
        Planes r[8];
        HYPERSPACE_UNROLL for (int i = 0; i < 8; ++i) r[i] = tile.planes(warp + 4 * i, lane);
        interpolate<BitPlanes, 0, 2, 0>(r);
        evaluate<BitPlanes, 32, 2, 0>(r);
        HYPERSPACE_UNROLL for (int i = 0; i < 8; ++i) tile.put(warp + 4 * i, lane, r[i]);
    }

    HYPERSPACE_INLINE static void store_group(const Params& p, Tile& tile, uint32_t at, uint32_t group,
                                              uint32_t lane) {
        Planes r[4];
        HYPERSPACE_UNROLL for (int i = 0; i < 4; ++i) r[i] = tile.planes(4 * group + i, lane);
        evaluate_group<32>(group, r);
        HYPERSPACE_UNROLL for (int i = 0; i < 4; ++i) {
            Piece piece[2];
            from_planes(r[i], piece[0], piece[1]);
            HYPERSPACE_UNROLL for (uint32_t half = 0; half < 2; ++half) {
                const uint32_t column = at + 16 * (lane + half * kLanes);
                uint8_t* chunk = p.chunks + size_t{kDataChunks + 4 * group + i} * p.chunk_bytes;
                if (column < p.chunk_bytes) store_piece(chunk + column, piece[half]);
            }
        }
    }
};

// ---- Decode and open. Any 32 of 64 (Lin, Chung, Han 2014, section V); cpu/kernels_body.h explains the
// steps.

struct DecodeParams {
    const uint8_t* chunks[kTotalChunks];  // nullptr: erased, 32 of them unless no data is lost
    uint8_t locator[kTotalChunks];        // product of (ω_i - ω_e) over the erased e != i
    uint8_t unscale[kDataChunks];         // 1 / locator
    SealKey seal;
    uint32_t data_lost;
    uint32_t chunk_bytes;
    uint32_t row_bytes;
    uint8_t* row;  // 16-byte aligned
};

struct TwoTiles {
    Tile low, high;
};

struct Decode {
    using Params = DecodeParams;
    using Shared = TwoTiles;
    static constexpr int kThreads = kWarps * kLanes, kPhases = 5, kBlocksPerSm = 2;

    static uint32_t blocks(const Params& p) { return (p.chunk_bytes + kTileBytes - 1) / kTileBytes; }

    template <int Phase>
    HYPERSPACE_INLINE static void run(const Params& p, Shared& tiles, uint32_t block, uint32_t thread) {
        const uint32_t at = block * kTileBytes, warp = thread / kLanes, lane = thread % kLanes;
        if constexpr (Phase <= 2) {
            HYPERSPACE_USUALLY(p.data_lost != 0);
            if (p.data_lost == 0) return;
        }
        if constexpr (Phase == 0) {
            HYPERSPACE_ROLL for (uint32_t half = 0; half < 2; ++half) {
                load_group<0>(p, tiles.low, at, 2 * warp + half, lane);
                load_group<32>(p, tiles.high, at, 2 * warp + half, lane);
            }
        } else if constexpr (Phase == 1) {
            Planes r[8];
            HYPERSPACE_UNROLL for (int i = 0; i < 8; ++i) r[i] = tiles.low.planes(warp + 4 * i, lane);
            interpolate<BitPlanes, 0, 2, 0>(r);
            HYPERSPACE_UNROLL for (int i = 0; i < 8; ++i) tiles.low.put(warp + 4 * i, lane, r[i]);
        } else if constexpr (Phase == 2) {
            derive_and_evaluate(tiles, warp, lane);
        } else if constexpr (Phase == 3) {
            fill_key_stream(p.seal, p.chunk_bytes, p.row_bytes, tiles.low, at, warp, lane);
        } else {
            HYPERSPACE_ROLL for (uint32_t half = 0; half < 2; ++half)
                store_group(p, tiles, at, 2 * warp + half, lane);
        }
    }

    template <int Coset>
    HYPERSPACE_INLINE static void load_group(const Params& p, Tile& tile, uint32_t at, uint32_t group,
                                             uint32_t lane) {
        Planes r[4];
        HYPERSPACE_UNROLL for (int i = 0; i < 4; ++i) {
            const uint8_t* chunk = p.chunks[Coset + 4 * group + i];
            HYPERSPACE_USUALLY((chunk == nullptr) == (Coset == 0));  // no data, all parity
            r[i] = {};
            if (!chunk) continue;
            r[i] = BitPlanes::multiply(load_planes(chunk, p.chunk_bytes, at, lane),
                                       p.locator[Coset + 4 * group + i]);
        }
        interpolate_group<Coset>(group, r);
        HYPERSPACE_UNROLL for (int i = 0; i < 4; ++i) tile.put(4 * group + i, lane, r[i]);
    }

    HYPERSPACE_INLINE static Planes load_planes(const uint8_t* chunk, uint32_t chunk_bytes, uint32_t at,
                                                uint32_t lane) {
        Piece piece[2] = {};
        HYPERSPACE_UNROLL for (uint32_t half = 0; half < 2; ++half) {
            const uint32_t column = at + 16 * (lane + half * kLanes);
            if (column < chunk_bytes) piece[half] = load_piece(chunk + column);
        }
        return to_planes(piece[0], piece[1]);
    }

    HYPERSPACE_INLINE static void derive_and_evaluate(Shared& tiles, uint32_t warp, uint32_t lane) {
        Planes r[8];
        HYPERSPACE_UNROLL for (int q = 0; q < 8; ++q) r[q] = tiles.high.planes(warp + 4 * q, lane);
        interpolate<BitPlanes, 32, 2, 0>(r);
        HYPERSPACE_UNROLL for (int q = 0; q < 8; ++q) {
            const uint32_t j = warp + 4 * q;
            r[q] = r[q] ^ tiles.low.planes(j, lane);  // layer 5: coefficient 32 + j = low + high
            HYPERSPACE_UNROLL for (int bit = 0; bit < 5; ++bit) {
                if (!(j >> bit & 1)) r[q] = r[q] ^ tiles.low.planes(j | 1u << bit, lane);
            }
        }
        evaluate<BitPlanes, 0, 2, 0>(r);
        HYPERSPACE_UNROLL for (int q = 0; q < 8; ++q) tiles.high.put(warp + 4 * q, lane, r[q]);
    }

    HYPERSPACE_INLINE static void store_group(const Params& p, Shared& tiles, uint32_t at, uint32_t group,
                                              uint32_t lane) {
        Planes r[4] = {};
        if (p.data_lost != 0) {
            HYPERSPACE_UNROLL for (int i = 0; i < 4; ++i) r[i] = tiles.high.planes(4 * group + i, lane);
            evaluate_group<0>(group, r);
        }
        HYPERSPACE_UNROLL for (int i = 0; i < 4; ++i) {
            const uint32_t row = 4 * group + i;
            const uint8_t* chunk = p.chunks[row];
            HYPERSPACE_USUALLY(chunk == nullptr && p.data_lost != 0);
            Piece piece[2] = {};
            if (!chunk) from_planes(BitPlanes::multiply(r[i], p.unscale[row]), piece[0], piece[1]);
            HYPERSPACE_UNROLL for (uint32_t half = 0; half < 2; ++half) {
                const uint32_t number = lane + half * kLanes, column = at + 16 * number;
                const uint32_t offset = row * p.chunk_bytes + column;
                if (column >= p.chunk_bytes || offset >= p.row_bytes) continue;
                if (chunk) piece[half] = load_piece(chunk + column);
                const Piece& stream = tiles.low.piece[row][Tile::slot(number)];
                store_first(p.row + offset, sealed(piece[half], stream, offset, p.row_bytes),
                            p.row_bytes - offset);
            }
        }
    }
};

}  // namespace hyperspace::cuda
