// Barriers of sm_90 on the emulated GPU: mbarrier with phases and byte counts, and those with
// numbers.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <set>

#include "../gpu.h"

namespace emulated {

// Where shared memory begins: an address of 0 would hide one that was never set.
constexpr uint32_t kSharedStart = 1024;

inline void require_inside(uint32_t address, uint32_t bytes) {
  require(
      address >= kSharedStart && address + bytes <= kSharedStart + gpu.shared_bytes,
      "address outside shared memory");
}

struct PhaseBarrier {
  unsigned phase = 0;
  unsigned arrivals, missing;
  int64_t bytes = 0;  // announced, not there yet
  bool ready = false;

  void end_if_complete() {
    if (missing > 0 || bytes > 0) return;
    missing = arrivals;
    ++phase;
  }
};

class PhaseBarriers {
 public:
  void init(uint32_t address, unsigned arrivals) {
    require_inside(address, 8);
    require(address % 8 == 0, "a barrier not aligned to 8 bytes");
    require(arrivals > 0 && barriers_.count(address) == 0, "a barrier initialized again");
    PhaseBarrier& made = barriers_[address];
    made.arrivals = made.missing = arrivals;
  }

  void make_ready() {
    for (auto& [_, barrier] : barriers_) barrier.ready = true;
  }

  void expect(uint32_t address, int64_t bytes) {
    PhaseBarrier& barrier = at(address);
    barrier.bytes += bytes;
    arrive(address);
  }

  void arrive(uint32_t address) {
    PhaseBarrier& barrier = at(address);
    require(barrier.missing > 0, "more arrivals than a phase has");
    --barrier.missing;
    barrier.end_if_complete();
    gpu.dawdle();
  }

  void complete(uint32_t address, int64_t bytes) {
    PhaseBarrier& barrier = at(address);
    barrier.bytes -= bytes;
    require(barrier.bytes >= 0, "bytes that nobody has announced");
    barrier.end_if_complete();
  }

  void wait(uint32_t address, uint32_t parity) {
    const PhaseBarrier& barrier = at(address);
    gpu.dawdle();
    while (barrier.phase % 2 == parity) gpu.wait_for_change(barrier.phase);
  }

  void require_none_within(uint32_t address, uint32_t bytes) const {
    const auto next = barriers_.lower_bound(address < 8 ? 0 : address - 7);
    require(next == barriers_.end() || next->first >= address + bytes, "a copy over a barrier");
  }

 private:
  PhaseBarrier& at(uint32_t address) {
    const auto found = barriers_.find(address);
    require(found != barriers_.end() && found->second.ready, "a barrier that is not ready");
    return found->second;
  }

  std::map<uint32_t, PhaseBarrier> barriers_;
};

// Of 256 threads, by number.
class NumberedBarriers {
 public:
  void arrive(int number) { enter(number); }

  void wait(int number) {
    const unsigned& generation = barriers_[number].generation;
    const unsigned before = generation;
    enter(number);
    if (generation == before) gpu.wait_for_change(generation);
  }

  void require_unused() const {
    for (const auto& barrier : barriers_) {
      require(barrier.arrived.empty(), "a numbered barrier left half full");
    }
  }

 private:
  struct Numbered {
    std::set<unsigned> arrived;
    unsigned generation = 0;
  };

  void enter(int number) {
    require(number > 0 && number < 16, "no such numbered barrier");
    Numbered& barrier = barriers_[number];
    require(
        barrier.arrived.insert(gpu.index()).second, "a thread twice at a numbered barrier");
    if (barrier.arrived.size() < 256) return;
    barrier.arrived.clear();
    ++barrier.generation;
  }

  std::array<Numbered, 16> barriers_;
};

}  // namespace emulated
