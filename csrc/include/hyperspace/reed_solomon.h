// Systematic Reed-Solomon over GF(2^8): 32 data chunks, 32 parity chunks, any 32 rebuild the rest.
//
// Data chunk j holds, byte by byte, the values at point ω_j of the polynomial of degree < 32 through the
// data; parity chunk j those at ω_{32+j}. Raw pointers only: callers have checked every size and overlap.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hyperspace::reed_solomon {

inline constexpr int kDataChunks = 32;
inline constexpr int kTotalChunks = 64;
inline constexpr size_t kAlignBytes = 256;  // chunks of a multiple of this need no staged tail

struct Kernels;  // one instruction set's implementation

// The fastest that this CPU runs and that passed its known-answer test when first asked for.
const Kernels& best_kernels();
// "avx2" or "portable"; nullptr when unknown here.
const Kernels* find_kernels(const char* name);
const char* name_of(const Kernels& kernels);

// parity[j] == nullptr: that row isn't wanted.
void encode(const Kernels& kernels, const uint8_t* const data[kDataChunks],
            uint8_t* const parity[kDataChunks], size_t chunk_bytes);

// chunks[i] == nullptr: chunk i is lost; at least 32 are present. Writes data chunk j to out[j], which may be
// chunks[j] itself and may overlap no other chunk.
void decode(const Kernels& kernels, const uint8_t* const chunks[kTotalChunks],
            uint8_t* const out[kDataChunks], size_t chunk_bytes);

}  // namespace hyperspace::reed_solomon
