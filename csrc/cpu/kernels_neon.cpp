// NEON, which every 64-bit ARM has: a product is two 16-entry table look-ups, as with AVX2.
//
// Compiled for aarch64 and tested only under qemu-user (`make test-neon`): not yet run on hardware.
#include <arm_neon.h>

#include "kernels_body.h"
#include "nibble_tables.h"

namespace hyperspace::reed_solomon {
namespace {

struct Neon {
    using Register = uint8x16_t;
    static constexpr int kBytes = 16;
    static constexpr int kSums = 8;

    static Register load(const uint8_t* from) { return vld1q_u8(from); }
    static void store(uint8_t* to, Register value) { vst1q_u8(to, value); }
    static void stream(uint8_t* to, Register value) { store(to, value); }  // STNP has no intrinsic
    static void fence() {}
    static void prefetch(const uint8_t* from) { __builtin_prefetch(from); }

    struct Factor {
        uint8x16_t low, high;
    };
    HYPERSPACE_INLINE static Factor factor(uint8_t c) {
        return {vld1q_u8(kNibbleTables.of[c].low), vld1q_u8(kNibbleTables.of[c].high)};
    }
    HYPERSPACE_INLINE static Register multiply(Register x, Factor c) {
        return vqtbl1q_u8(c.low, vandq_u8(x, vdupq_n_u8(15))) ^ vqtbl1q_u8(c.high, vshrq_n_u8(x, 4));
    }
    template <uint8_t C>
    HYPERSPACE_INLINE static Register multiply(Register x) {
        return multiply(x, factor(C));
    }
};

}  // namespace

const Kernels kNeonKernels = Body<Neon>::kernels("neon", 5, 10);

}  // namespace hyperspace::reed_solomon
