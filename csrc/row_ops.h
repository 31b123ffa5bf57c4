// Passes over one row of a tile, compiled for every x86 level where the compiler can.
#pragma once

#include <cstdint>

namespace cac_fast {

// Replaces each logit x, in units of log 2, by 2^(x - offset) and returns their sum.
// Differences below -126 count as -126: at most 1e-38 of the largest weight.
float exp2_sum(float* logits, int64_t count, float offset);
double exp2_sum(double* logits, int64_t count, double offset);

// The largest of `count` > 0 values; a NaN among them need not be seen.
float largest(const float* values, int64_t count);
double largest(const double* values, int64_t count);

}  // namespace cac_fast
