// The products of every constant with every half of a byte, for CPUs that look up 16 entries at a time.
#pragma once

#include "hyperspace/gf256.h"

namespace hyperspace::reed_solomon {

struct alignas(32) NibbleTables {
    uint8_t low[16];   // low[n] = c * n
    uint8_t high[16];  // high[n] = c * 16n
};
struct AllNibbleTables {
    NibbleTables of[256];
};
constexpr AllNibbleTables make_nibble_tables() {
    AllNibbleTables tables{};
    for (int c = 0; c < 256; ++c) {
        for (int n = 0; n < 16; ++n) {
            tables.of[c].low[n] = gf256::multiply(static_cast<uint8_t>(c), static_cast<uint8_t>(n));
            tables.of[c].high[n] = gf256::multiply(static_cast<uint8_t>(c), static_cast<uint8_t>(n << 4));
        }
    }
    return tables;
}
inline constexpr AllNibbleTables kNibbleTables = make_nibble_tables();

}  // namespace hyperspace::reed_solomon
