// What one instruction set implements. `bytes` is always a multiple of kAlignBytes; alignment is free.
// `stream`: the output is too large to be useful in the caches; bypass them where its alignment allows.
#pragma once

#include "hyperspace/reed_solomon.h"

namespace hyperspace::reed_solomon {

struct Kernels {
    const char* name;

    // Up to this many rows, plain sums of products beat the transform from half to half, and recovery.
    int combine_before_transform, combine_before_recovery;

    // All of one half to the wanted (non-null) rows of the other.
    void (*data_to_parity)(const uint8_t* const in[32], uint8_t* const out[32], size_t bytes, bool stream);
    void (*parity_to_data)(const uint8_t* const in[32], uint8_t* const out[32], size_t bytes, bool stream);

    // out[o] = sum over i of coefficients[o * 32 + i] * in[i].
    void (*combine)(const uint8_t* const in[32], const uint8_t* coefficients, uint8_t* const* out,
                    int outputs, size_t bytes);

    // in[i] is null for exactly 32 of the 64 points, the erased ones; locator[i] is the product of
    // (ω_i - ω_e) over the erased e != i. Writes the wanted data rows, all of them erased.
    void (*recover)(const uint8_t* const in[64], const uint8_t locator[64], uint8_t* const out[32],
                    size_t bytes, bool stream);

    // Makes streamed output visible to other threads: after the last kernel, before the call returns.
    void (*fence)();
};

extern const Kernels kPortableKernels;
#ifdef HYPERSPACE_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif
#ifdef HYPERSPACE_NEON
extern const Kernels kNeonKernels;
#endif

}  // namespace hyperspace::reed_solomon
