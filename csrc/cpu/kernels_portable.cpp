// For any CPU that GCC or Clang compiles for: 16 bytes at a time, eight masks per product.
#include <cstring>

#include "kernels_body.h"

namespace hyperspace::reed_solomon {
namespace {

struct Portable {
    typedef uint8_t Register __attribute__((vector_size(16)));
    static constexpr int kBytes = 16;
    static constexpr int kSums = 4;

    static Register load(const uint8_t* from) {
        Register value;
        std::memcpy(&value, from, sizeof value);
        return value;
    }
    static void store(uint8_t* to, Register value) { std::memcpy(to, &value, sizeof value); }
    static void stream(uint8_t* to, Register value) { store(to, value); }
    static void fence() {}
    static void prefetch(const uint8_t*) {}

    using Factor = uint8_t;
    static Factor factor(uint8_t c) { return c; }
    // c * x is the sum of c * 2^bit over the bits of x. Out of line: inlined 700 times, it would be 200 KB.
    __attribute__((noinline)) static Register multiply(Register x, Factor c) {
        Register product = {};
        for (int bit = 0; bit < 8; ++bit) {
            const uint8_t selected = static_cast<uint8_t>(1 << bit);
            const auto has_bit = (x & selected) != 0;  // 0xFF or 0 in each byte
            product ^= reinterpret_cast<Register>(has_bit) & c;
            c = gf256::multiply(c, 2);
        }
        return product;
    }
    template <uint8_t C>
    HYPERSPACE_INLINE static Register multiply(Register x) {
        return multiply(x, C);
    }
};

}  // namespace

const Kernels kPortableKernels = Body<Portable>::kernels("portable", 5, 10);

}  // namespace hyperspace::reed_solomon
