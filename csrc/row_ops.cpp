#include "row_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "clones.h"

namespace cac_fast {
namespace {

// 2^x, relative error below 1e-7; 0 for x < -126. x must lie in [-2^22, 127].
inline float exp2_fast(float x) {
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum: round and convert in
  // one addition, which every instruction set has.
  constexpr float magic = 12582912.0F;
  const float shifted = x + magic;
  const float f = x - (shifted - magic);
  // Minimax polynomial of 2^f on [-1/2, 1/2] (Remez, degree 6, relative error 1.9e-9).
  float y = 0.000153458121613F;
  y = y * f + 0.00133999311772F;
  y = y * f + 0.00961848895633F;
  y = y * f + 0.0555032877711F;
  y = y * f + 0.240226468906F;
  y = y * f + 0.693147205737F;
  y = y * f + 1.00000000055F;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = static_cast<int32_t>((static_cast<uint32_t>(bits) + 127U) << 23);
  bits &= -static_cast<int32_t>(!(x < -126.0F));
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return y * power;  // a product, so that NaN stays NaN
}

}  // namespace

CAC_FAST_CLONES
float exp2_sum(float* logits, int64_t count, float scale, float offset) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) {
    const float weight = exp2_fast(scale * logits[j] - offset);
    logits[j] = weight;
    sum += weight;
  }
  return sum;
}

double exp2_sum(double* logits, int64_t count, double scale, double offset) {
  double sum = 0;
  for (int64_t j = 0; j < count; ++j) {
    logits[j] = std::exp2(scale * logits[j] - offset);
    sum += logits[j];
  }
  return sum;
}

CAC_FAST_CLONES
float largest(const float* values, int64_t count) {
  float result = values[0];
#pragma omp simd reduction(max : result)
  for (int64_t j = 1; j < count; ++j) {
    result = values[j] > result ? values[j] : result;
  }
  return result;
}

double largest(const double* values, int64_t count) {
  return *std::max_element(values, values + count);
}

}  // namespace cac_fast
