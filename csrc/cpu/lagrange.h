// The value of the data's polynomial at one point, as a sum over 32 points where it is known.
#pragma once

#include "hyperspace/gf256.h"
#include "hyperspace/reed_solomon.h"

namespace hyperspace::reed_solomon {

struct Points {
    uint8_t of[kTotalChunks] = {};
};
constexpr Points make_points() {
    Points points;
    for (int i = 0; i < kTotalChunks; ++i) points.of[i] = gf256::point(static_cast<unsigned>(i));
    return points;
}
inline constexpr Points kPoints = make_points();

inline int log_difference(int i, int j) { return gf256::kLogarithms.log[kPoints.of[i] ^ kPoints.of[j]]; }

// Lagrange's formula, in logarithms: the part that depends on the known points alone is computed once.
class Lagrange {
  public:
    explicit Lagrange(const uint8_t known[kDataChunks]) : known_(known) {
        for (int i = 0; i < kDataChunks; ++i) {
            int log = 0;
            for (int m = 0; m < kDataChunks; ++m) {
                if (m != i) log += 255 - log_difference(known[i], known[m]);
            }
            weight_[i] = log % 255;
        }
    }

    // Fills coefficients[i] such that f(ω_target) = sum of coefficients[i] * f(ω_known[i]); target must not
    // be a known point.
    void row(int target, uint8_t* coefficients) const {
        int all = 0;
        for (int i = 0; i < kDataChunks; ++i) all += log_difference(target, known_[i]);
        for (int i = 0; i < kDataChunks; ++i) {
            const int log = all - log_difference(target, known_[i]) + weight_[i];
            coefficients[i] = gf256::kLogarithms.exp[log % 255];
        }
    }

  private:
    const uint8_t* known_;
    int weight_[kDataChunks];
};

}  // namespace hyperspace::reed_solomon
