// Stands in for csrc/cuda/device.cuh: the kernels on the emulated GPU of gpu.h.
//
// What the instructions of the matrix unit do is written down here a second time, from the layouts
// in the PTX ISA. Emulated as unkindly as the ISA allows: copies to shared memory arrive at once or
// as late as possible, at random, and until then there is NaN. Broken rules throw
// std::runtime_error: lanes that do not meet, addresses outside shared memory or not aligned,
// matrix rows that share a bank, operands that are not rounded to TF32.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "gpu.h"

#define __device__
#define __global__
#define __shared__
#define __align__(n)
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct float2 {
  float x, y;
};

struct float4 {
  float x, y, z, w;
};

inline void __syncthreads() { emulated::gpu.wait_for_all(); }

inline float __shfl_xor_sync(unsigned, float x, unsigned distance) {
  using namespace emulated;
  const unsigned lane = gpu.lane();
  return float_of(gpu.meet("shuffle xor", {bits_of(x)}).given[lane ^ distance][0]);
}

inline float __shfl_sync(unsigned, float x, unsigned source, unsigned width) {
  using namespace emulated;
  const unsigned lane = gpu.lane() / width * width + source % width;
  return float_of(gpu.meet("shuffle", {bits_of(x)}).given[lane][0]);
}

namespace cac_fast::cuda {

alignas(128) inline char shared_memory[256 * 1024];

inline void require_shared(const void* pointer) {
  const auto offset = static_cast<const char*>(pointer) - shared_memory;
  emulated::require(
      offset >= 0 && offset + 16 <= static_cast<ptrdiff_t>(emulated::gpu.shared_bytes),
      "address outside shared memory");
  emulated::require(offset % 16 == 0, "address not aligned to 16 bytes");
}

// Eight rows of 16 bytes are read at a time, from 128 bytes of banks.
inline void require_no_bank_twice(const emulated::Meeting& meeting) {
  for (unsigned first = 0; first < emulated::kWarp; first += 8) {
    unsigned seen = 0;
    for (unsigned i = first; i < first + 8; ++i) seen |= 1U << (meeting.given[i][0] / 16 % 8);
    emulated::require(seen == 0xFF, "rows in one bank");
  }
}

inline void copy_async_16(void* shared, const void* global) {
  require_shared(shared);
  emulated::require(reinterpret_cast<uintptr_t>(global) % 16 == 0, "copy not aligned to 16 bytes");
  emulated::Copy copy{static_cast<char*>(shared), {}};
  for (const auto& group : emulated::gpu.thread().groups) {
    for (const emulated::Copy& other : group) {
      emulated::require(other.to != copy.to, "two copies on their way to one place");
    }
  }
  std::memcpy(copy.bytes.data(), global, 16);
  if (emulated::gpu.random() % 2) {
    std::memcpy(shared, copy.bytes.data(), 16);
  } else {
    std::memset(shared, 0xFF, 16);
    emulated::gpu.thread().groups.back().push_back(copy);
  }
}

inline void copy_async_commit() { emulated::gpu.thread().groups.emplace_back(); }

template <int kPending>
void copy_async_wait() {
  auto& groups = emulated::gpu.thread().groups;
  while (groups.size() > kPending + 1) {
    for (const emulated::Copy& copy : groups.front()) std::memcpy(copy.to, copy.bytes.data(), 16);
    groups.erase(groups.begin());
  }
}

inline int not_hoisted(int value) { return value; }

inline uint16_t element(
    const emulated::Meeting& meeting, unsigned matrix, unsigned row, unsigned column) {
  uint16_t value;
  const auto* start = reinterpret_cast<const char*>(meeting.given[8 * matrix + row][1]);
  std::memcpy(&value, start + 2 * column, sizeof value);
  return value;
}

inline void load_matrices(uint32_t (&matrices)[4], const void* row, bool transposed) {
  require_shared(row);
  const unsigned g = emulated::gpu.lane() / 4, t = emulated::gpu.lane() % 4;
  const auto offset = static_cast<uint64_t>(static_cast<const char*>(row) - shared_memory);
  const auto& meeting = emulated::gpu.meet(
      transposed ? "ldmatrix.trans" : "ldmatrix", {offset, reinterpret_cast<uint64_t>(row)});
  require_no_bank_twice(meeting);
  for (unsigned i = 0; i < 4; ++i) {
    const uint32_t low =
        transposed ? element(meeting, i, 2 * t, g) : element(meeting, i, g, 2 * t);
    const uint32_t high =
        transposed ? element(meeting, i, 2 * t + 1, g) : element(meeting, i, g, 2 * t + 1);
    matrices[i] = low | high << 16;
  }
}

inline void load_matrices(uint32_t (&matrices)[4], const void* row) {
  load_matrices(matrices, row, false);
}

inline void load_matrices_transposed(uint32_t (&matrices)[4], const void* row) {
  load_matrices(matrices, row, true);
}

// Number `index` of the k values of a lane's operand: `registers` as in mma.sync.
template <class Element>
float operand(const uint64_t* registers, unsigned index) {
  if constexpr (sizeof(Element) == 4) {
    emulated::require((registers[index] & 0x1FFF) == 0, "an operand that is not TF32");
    return emulated::float_of(registers[index]);
  } else {
    const auto bits = static_cast<uint16_t>(registers[index / 2] >> (16 * (index % 2)));
    return static_cast<float>(Element(bits, Element::from_bits()));
  }
}

// Which lane and which of its values hold an element, as the PTX ISA draws them.
struct Where {
  unsigned lane, index;
};

template <class Element>
Where of_a(unsigned row, unsigned k) {
  if constexpr (sizeof(Element) == 4) return {4 * (row % 8) + k % 4, row / 8 + 2 * (k / 4)};
  return {4 * (row % 8) + k % 8 / 2, k % 2 + 2 * (row / 8) + 4 * (k / 8)};
}

template <class Element>
Where of_b(unsigned k, unsigned column) {
  if constexpr (sizeof(Element) == 4) return {4 * column + k % 4, k / 4};
  return {4 * column + k % 8 / 2, k % 2 + 2 * (k / 8)};
}

template <class Element>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const unsigned g = emulated::gpu.lane() / 4, t = emulated::gpu.lane() % 4;
  const auto& given = emulated::gpu.meet("mma", {a[0], a[1], a[2], a[3], b0, b1}).given;
  constexpr unsigned kDepth = sizeof(Element) == 4 ? 8 : 16;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = g + 8 * (i / 2), column = 2 * t + i % 2;
    double sum = c[i];
    for (unsigned k = 0; k < kDepth; ++k) {
      const Where at_a = of_a<Element>(row, k), at_b = of_b<Element>(k, column);
      sum += static_cast<double>(operand<Element>(given[at_a.lane].data(), at_a.index)) *
             operand<Element>(given[at_b.lane].data() + 4, at_b.index);
    }
    c[i] = static_cast<float>(sum);
  }
}

template <class Element>
uint32_t pack(float low, float high) {
  return Element(low).x | static_cast<uint32_t>(Element(high).x) << 16;
}

inline float as_float(uint32_t bits) { return emulated::float_of(bits); }

inline uint32_t round_to_tf32(float x) {
  return static_cast<uint32_t>((emulated::bits_of(x) + 0x1000) & ~0x1FFFULL);
}

inline float exp2_fast(float x) { return x < -126 ? 0 : std::exp2(x); }

}  // namespace cac_fast::cuda
