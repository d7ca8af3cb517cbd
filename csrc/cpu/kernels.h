// What one instruction set implements. `bytes` is always a multiple of kAlignBytes; alignment is free.
#pragma once

#include "hyperspace/reed_solomon.h"

namespace hyperspace::reed_solomon {

struct Kernels {
    const char* name;

    // All of one half to the wanted (non-null) rows of the other.
    void (*data_to_parity)(const uint8_t* const in[32], uint8_t* const out[32], size_t bytes);
    void (*parity_to_data)(const uint8_t* const in[32], uint8_t* const out[32], size_t bytes);

    // out[o] = sum over i of coefficients[o * 32 + i] * in[i].
    void (*combine)(const uint8_t* const in[32], const uint8_t* coefficients, uint8_t* const* out,
                    int outputs, size_t bytes);

    // in[i] is null for exactly 32 of the 64 points, the erased ones; locator[i] is the product of
    // (ω_i - ω_e) over the erased e != i. Writes the wanted data rows, all of them erased.
    void (*recover)(const uint8_t* const in[64], const uint8_t locator[64], uint8_t* const out[32],
                    size_t bytes);
};

extern const Kernels kPortableKernels;
#ifdef HYPERSPACE_AVX2
extern const Kernels kAvx2Kernels;
#endif

}  // namespace hyperspace::reed_solomon
