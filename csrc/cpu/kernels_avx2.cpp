// AVX2: a product is two 16-entry table look-ups, one for each half of a byte.
//
// J. S. Plank, K. M. Greenan, E. L. Miller, "Screaming Fast Galois Field Arithmetic Using Intel SIMD
// Instructions", FAST 2013; the technique goes back to H. P. Anvin, "The mathematics of RAID-6".
#include <immintrin.h>

#include "kernels_body.h"
#include "nibble_tables.h"

namespace hyperspace::reed_solomon {
namespace {

struct Avx2 {
    using Register = __m256i;
    static constexpr int kBytes = 32;
    static constexpr int kSums = 4;

    static Register load(const uint8_t* from) { return _mm256_loadu_si256((const __m256i*)from); }
    static void store(uint8_t* to, Register value) { _mm256_storeu_si256((__m256i*)to, value); }
    static void stream(uint8_t* to, Register value) { _mm256_stream_si256((__m256i*)to, value); }
    static void fence() { _mm_sfence(); }
    static void prefetch(const uint8_t* from) { _mm_prefetch((const char*)from, _MM_HINT_T0); }

    struct Factor {
        __m256i low, high;
    };
    HYPERSPACE_INLINE static Factor factor(uint8_t c) {
        return {_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)kNibbleTables.of[c].low)),
                _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)kNibbleTables.of[c].high))};
    }
    HYPERSPACE_INLINE static Register multiply(Register x, Factor c) {
        const __m256i nibble = _mm256_set1_epi8(15);
        const __m256i low = _mm256_and_si256(x, nibble);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi64(x, 4), nibble);
        return _mm256_shuffle_epi8(c.low, low) ^ _mm256_shuffle_epi8(c.high, high);
    }
    template <uint8_t C>
    HYPERSPACE_INLINE static Register multiply(Register x) {
        return multiply(x, factor(C));
    }
};

}  // namespace

const Kernels kAvx2Kernels = Body<Avx2>::kernels("avx2", 5, 10);

}  // namespace hyperspace::reed_solomon
