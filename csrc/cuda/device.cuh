// The instructions that C++ has no words for, each in a function of its own. The kernels use the
// GPU through these functions, barriers and shuffles alone, so that a test can put an emulation in
// the place of this file (tests/emulated_gpu/device.cuh).
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

namespace cac_fast::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, past the registers and the L1 cache; both aligned.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared_address(shared)), "l"(global)
      : "memory");
}

// Closes a group of this thread's copies; it may be empty.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most kPending of this thread's groups, the last ones, are not there yet.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// The value, of an origin that the compiler does not know: so that it computes what depends on it
// where that is used, and keeps none of it in registers all through a loop.
__device__ __forceinline__ int not_hoisted(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Four 8 x 8 matrices of 16 bits. Lanes 8i to 8i + 7 point to the rows of matrix i, 16 bytes each;
// lane 4g + t gets elements (g, 2t) and (g, 2t + 1) of matrix i in `matrices[i]`.
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, transposed: lane 4g + t gets elements (2t, g) and (2t + 1, g).
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

#define CAC_FAST_MMA(DEPTH, TYPE) \
  asm("mma.sync.aligned.m16n8k" DEPTH ".row.col.f32." TYPE "." TYPE ".f32 " \
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// c (16 x 8) += a (16 x k) b (k x 8) of a warp, k = 16 for 16 bits and 8 for TF32. Lane 4g + t
// holds c (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1); of 16 bits two a register, k first:
// a (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); b (2t, g), (2t + 8, g);
// of TF32 a (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b (t, g), (t + 4, g).
template <class Element>
__device__ __forceinline__ void multiply_add(
    float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<Element, c10::BFloat16>) CAC_FAST_MMA("16", "bf16");
  if constexpr (std::is_same_v<Element, c10::Half>) CAC_FAST_MMA("16", "f16");
  if constexpr (std::is_same_v<Element, float>) CAC_FAST_MMA("8", "tf32");
}

// Two floats rounded to 16 bits, `low` in the low half.
template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<Element, c10::BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// The nearest TF32 number; the matrix unit by itself would cut the last bits off.
__device__ __forceinline__ uint32_t round_to_tf32(float x) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(rounded) : "f"(x));
  return rounded;
}

// 2^x, relative error 2^-22; 0 where the result would be below 2^-126.
__device__ __forceinline__ float exp2_fast(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(power) : "f"(x));
  return power;
}

__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }

}  // namespace cac_fast::cuda
