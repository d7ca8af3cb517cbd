// The code of docs/protocol.md, systematic Reed-Solomon over GF(2^8): 32 data chunks, 32 parity chunks, any
// 32 rebuild the rest.
//
// Data chunk j holds, byte by byte, the values at point ω_j of the polynomial of degree < 32 through the
// data; parity chunk j those at ω_{32+j}. Raw pointers only: callers have checked every size and overlap. No
// call allocates, except for the first threaded one, which starts helpers. `threads` is how many may work on
// a call, the caller included.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hyperspace::reed_solomon {

inline constexpr int kDataChunks = 32;
inline constexpr int kTotalChunks = 64;
inline constexpr size_t kAlignBytes = 256;  // chunks of a multiple of this need no staged tail

struct Kernels;  // one instruction set's implementation

// The fastest set that this CPU runs and that passed its known-answer test at the first call.
const Kernels& best_kernels();
// Names, fastest first, of all compiled-in sets; nullptr after the last.
const char* const* kernel_names();
// nullptr when the name is unknown or this CPU doesn't run it. Not tested: best_kernels() is.
const Kernels* find_kernels(const char* name);
const char* name_of(const Kernels& kernels);
// Whether parity and every way to rebuild agree with Lagrange's formula.
bool passes_known_answers(const Kernels& kernels);

// parity[j] == nullptr: that row isn't wanted.
void encode(const Kernels& kernels, const uint8_t* const data[kDataChunks],
            uint8_t* const parity[kDataChunks], size_t chunk_bytes, int threads = 1);

// chunks[i] == nullptr: chunk i is lost; at least 32 are present. Writes data chunk j to out[j], which may be
// chunks[j] itself and may overlap no other chunk.
void decode(const Kernels& kernels, const uint8_t* const chunks[kTotalChunks],
            uint8_t* const out[kDataChunks], size_t chunk_bytes, int threads = 1);

// Decodes from the first 32 chunks present and encodes again, while the columns are in cache. Bit j of the
// result: parity chunk j is present beyond those 32 and contradicts them.
uint32_t decode_and_check(const Kernels& kernels, const uint8_t* const chunks[kTotalChunks],
                          uint8_t* const out[kDataChunks], size_t chunk_bytes, int threads = 1);

}  // namespace hyperspace::reed_solomon
