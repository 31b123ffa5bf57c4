// Passes over one row of a tile, compiled for every x86 level where the compiler can.
#pragma once

#include <cstdint>

namespace cac_fast {

// Replaces each x by 2^(scale x - offset) and returns their sum.
// Differences below -126 give 0, not the 1e-38 or less of the largest weight that they are.
float exp2_sum(float* logits, int64_t count, float scale, float offset);
double exp2_sum(double* logits, int64_t count, double scale, double offset);

// The largest of `count` > 0 values; a NaN among them need not be seen.
float largest(const float* values, int64_t count);
double largest(const double* values, int64_t count);

}  // namespace cac_fast
