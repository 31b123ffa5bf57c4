// A GPU on the CPU, for the kernels of csrc/cuda: stands in for their device.cuh.
//
// The threads of a program are fibers on one core, run in random order between the points where
// they must wait for each other, one warp far ahead of the others. What the instructions of the matrix unit do is written down here
// a second time, from the layouts in the PTX ISA. Emulated as unkindly as the ISA allows: copies to
// shared memory arrive at once or as late as possible, at random, and until then there is NaN.
// Broken rules throw std::runtime_error: lanes that do not meet, addresses outside shared memory
// or not aligned, matrix rows that share a bank, operands that are not rounded to TF32.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __align__(n)
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

struct float4 {
  float x, y, z, w;
};

namespace emulated {

inline void require(bool condition, const char* rule) {
  if (!condition) throw std::runtime_error(std::string("emulated GPU: ") + rule);
}

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 1 << 18;

// What lanes of a warp hand to each other at one meeting.
struct Meeting {
  std::array<std::array<uint64_t, 12>, kWarp> given;
  std::array<const char*, kWarp> what;
};

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Copy {
  char* to;
  std::array<char, 16> bytes;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Barrier* waits_for;
  unsigned generation;
  unsigned meetings;
  std::vector<std::vector<Copy>> groups;  // of copies on their way, the last one still open
  bool done;
};

class Gpu {
 public:
  std::mt19937 random{0};
  size_t shared_bytes = 0;

  // Runs `body` as every thread of one program.
  void run_program(unsigned count, const std::function<void()>& body) {
    body_ = &body;
    error_ = nullptr;
    if (threads_.size() < count) threads_.resize(count);
    count_ = count;
    warps_.assign((count + kWarp - 1) / kWarp, {});
    all_ = {};
    for (unsigned i = 0; i < count; ++i) start(i);
    std::vector<unsigned> ready;
    unsigned ahead = 0;
    while (true) {
      ready.clear();
      unsigned left = 0;
      for (unsigned i = 0; i < count; ++i) {
        Thread& thread = threads_[i];
        if (thread.done) continue;
        ++left;
        if (!thread.waits_for || thread.generation != thread.waits_for->generation) {
          ready.push_back(i);
        }
      }
      if (left == 0) return;
      require(!ready.empty(), "threads wait for others that never come");
      // One warp goes ahead as far as it can, so that warps are as far apart as barriers allow.
      const auto is_ahead = [&](unsigned i) { return i / kWarp == ahead; };
      if (random() % 64 == 0 || std::none_of(ready.begin(), ready.end(), is_ahead)) {
        ahead = ready[random() % ready.size()] / kWarp;
      }
      ready.erase(std::stable_partition(ready.begin(), ready.end(), is_ahead), ready.end());
      std::shuffle(ready.begin(), ready.end(), random);
      for (const unsigned i : ready) {
        current_ = i;
        threadIdx.x = i;
        swapcontext(&scheduler_, &threads_[i].context);
        if (error_) std::rethrow_exception(error_);
      }
    }
  }

  Thread& thread() { return threads_[current_]; }
  unsigned lane() const { return current_ % kWarp; }

  void wait_for_all() { wait(all_, count_); }

  // Hands `given` to the other lanes and returns what all have given. Two of these are in use in
  // turn: nobody can be two meetings ahead.
  const Meeting& meet(const char* what, const std::array<uint64_t, 12>& given) {
    Warp& warp = warps_[current_ / kWarp];
    Meeting& meeting = warp.meetings[thread().meetings++ % 2];
    meeting.given[lane()] = given;
    meeting.what[lane()] = what;
    wait(warp.barrier, kWarp);
    for (const char* other : meeting.what) require(other == what, "lanes meet for other things");
    return meeting;
  }

 private:
  struct Warp {
    Barrier barrier;
    std::array<Meeting, 2> meetings;
  };

  void start(unsigned i) {
    Thread& thread = threads_[i];
    if (!thread.stack) thread.stack = std::make_unique<char[]>(kStack);
    thread.waits_for = nullptr;
    thread.meetings = 0;
    thread.groups.assign(1, {});
    thread.done = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = &scheduler_;
    makecontext(&thread.context, reinterpret_cast<void (*)()>(&Gpu::enter), 0);
  }

  static void enter();

  void wait(Barrier& barrier, unsigned count) {
    Thread& mine = thread();
    if (++barrier.arrived == count) {
      barrier.arrived = 0;
      ++barrier.generation;
      return;
    }
    mine.waits_for = &barrier;
    mine.generation = barrier.generation;
    swapcontext(&mine.context, &scheduler_);
    mine.waits_for = nullptr;
  }

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Barrier all_;
  ucontext_t scheduler_;
  unsigned count_ = 0, current_ = 0;
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr error_;
};

inline Gpu gpu;

inline void Gpu::enter() {
  try {
    (*gpu.body_)();
  } catch (...) {
    gpu.error_ = std::current_exception();
  }
  gpu.thread().done = true;
}

inline uint64_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint64_t bits) {
  const auto low = static_cast<uint32_t>(bits);
  float x;
  std::memcpy(&x, &low, sizeof x);
  return x;
}

}  // namespace emulated

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
