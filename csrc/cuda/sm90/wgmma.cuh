// wgmma: matrix products of a warpgroup that run while it goes on.
//
// Results d (64 x N) are float d[N / 8][4] of each thread: lane 4g + t of warp w holds in d[n] the
// elements (16w + g, 8n + 2t), (.., + 1), (16w + g + 8, 8n + 2t), (.., + 1). Between issue and wait
// neither they nor a left operand in registers may be touched.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <type_traits>

namespace cac_fast::cuda::sm90 {

// Orders what was done with registers before what comes.
__device__ __forceinline__ void products_fence() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

// Closes a group of products.
__device__ __forceinline__ void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// Waits until at most kPending groups, the last ones, are not done.
template <int kPending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// The compiler moves no use of these registers to the other side of this line.
template <int n>
__device__ __forceinline__ void hold_in_place(float (&registers)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(registers[i][j])::"memory");
  }
}

template <int n>
__device__ __forceinline__ void hold_in_place(uint32_t (&registers)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(registers[i][j])::"memory");
  }
}

// The operands d: their names %0, %1, .. in the instruction, and their values.
#define CAC_FAST_TEN(t) \
  "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9"
#define CAC_FAST_NAMES_30 CAC_FAST_TEN() "," CAC_FAST_TEN(1) "," CAC_FAST_TEN(2)
#define CAC_FAST_NAMES_60 \
  CAC_FAST_NAMES_30 "," CAC_FAST_TEN(3) "," CAC_FAST_TEN(4) "," CAC_FAST_TEN(5)
#define CAC_FAST_NAMES_64 CAC_FAST_NAMES_30 ",%30,%31"
#define CAC_FAST_NAMES_128 CAC_FAST_NAMES_60 ",%60,%61,%62,%63"
#define CAC_FAST_NAMES_90 \
  CAC_FAST_NAMES_60 "," CAC_FAST_TEN(6) "," CAC_FAST_TEN(7) "," CAC_FAST_TEN(8)
#define CAC_FAST_NAMES_256 \
  CAC_FAST_NAMES_90 "," CAC_FAST_TEN(9) "," CAC_FAST_TEN(10) "," CAC_FAST_TEN(11) \
      ",%120,%121,%122,%123,%124,%125,%126,%127"

#define CAC_FAST_FOUR(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define CAC_FAST_EIGHT(i) CAC_FAST_FOUR(i), CAC_FAST_FOUR(i + 1)
#define CAC_FAST_VALUES_64 \
  CAC_FAST_EIGHT(0), CAC_FAST_EIGHT(2), CAC_FAST_EIGHT(4), CAC_FAST_EIGHT(6)
#define CAC_FAST_VALUES_128 \
  CAC_FAST_VALUES_64, CAC_FAST_EIGHT(8), CAC_FAST_EIGHT(10), CAC_FAST_EIGHT(12), \
      CAC_FAST_EIGHT(14)
#define CAC_FAST_VALUES_256 \
  CAC_FAST_VALUES_128, CAC_FAST_EIGHT(16), CAC_FAST_EIGHT(18), CAC_FAST_EIGHT(20), \
      CAC_FAST_EIGHT(22), CAC_FAST_EIGHT(24), CAC_FAST_EIGHT(26), CAC_FAST_EIGHT(28), \
      CAC_FAST_EIGHT(30)

// d = a b, or d += a b with `add`: a (64 x 16) and b (16 x N) in shared memory, their 16 channels
// next to each other (K-major).
#define CAC_FAST_SHARED(TYPE, N, A, B, ADD) \
  asm volatile( \
      "{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" CAC_FAST_NAMES_##N \
      "}, " A ", " B ", add, 1, 1, 0, 0;\n}\n" \
      : CAC_FAST_VALUES_##N \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))

// d += a b: a (64 x 16) in registers, as mma.m16n8k16 wants it; b in shared memory, its N channels
// next to each other (MN-major).
#define CAC_FAST_REGISTERS(TYPE, N, A0, A1, A2, A3, B, ADD) \
  asm volatile( \
      "{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" CAC_FAST_NAMES_##N \
      "}, {" A0 "," A1 "," A2 "," A3 "}, " B ", add, 1, 1, 1;\n}\n" \
      : CAC_FAST_VALUES_##N \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1))

#define CAC_FAST_BY_TYPE(MACRO, ...) \
  if constexpr (std::is_same_v<Element, c10::BFloat16>) { \
    MACRO("bf16", __VA_ARGS__); \
  } else { \
    MACRO("f16", __VA_ARGS__); \
  }

#define CAC_FAST_MULTIPLY(N, ...) \
  template <class Element> \
  __device__ __forceinline__ void multiply( \
      float (&d)[N / 8][4], uint64_t a, uint64_t b, bool add) { \
    CAC_FAST_BY_TYPE(CAC_FAST_SHARED, N, __VA_ARGS__) \
  }

#define CAC_FAST_MULTIPLY_ADD(N, ...) \
  template <class Element> \
  __device__ __forceinline__ void multiply_add( \
      float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b) { \
    CAC_FAST_BY_TYPE(CAC_FAST_REGISTERS, N, __VA_ARGS__) \
  }

CAC_FAST_MULTIPLY(64, "%32", "%33", "%34")
CAC_FAST_MULTIPLY(128, "%64", "%65", "%66")

CAC_FAST_MULTIPLY_ADD(64, "%32", "%33", "%34", "%35", "%36", "%37")
CAC_FAST_MULTIPLY_ADD(128, "%64", "%65", "%66", "%67", "%68", "%69")
CAC_FAST_MULTIPLY_ADD(256, "%128", "%129", "%130", "%131", "%132", "%133")

}  // namespace cac_fast::cuda::sm90
