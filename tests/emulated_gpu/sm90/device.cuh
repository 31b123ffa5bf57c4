// Stands in for csrc/cuda/sm90/device.cuh and wgmma.cuh. Include ../device.cuh first.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "../gpu.h"
#include "barriers.h"
#include "boxes.h"
#include "products.h"

#define CAC_FAST_SM90A

namespace emulated {

// What a running program has of sm_90's own.
struct Sm90 {
  PhaseBarriers barriers;
  NumberedBarriers numbered;
  Copies copies{barriers};
  std::array<Warpgroup, 3> warpgroups;
  std::vector<int> registers;

  Warpgroup& warpgroup() { return warpgroups.at(gpu.index() / kWarpgroup); }

  void set_registers(int each) {
    require(each >= 24 && each <= 256 && each % 8 == 0, "no such number of registers");
    registers.at(gpu.index()) = each;
  }

  void require_finished() const {
    numbered.require_unused();
    for (const Warpgroup& warpgroup : warpgroups) warpgroup.require_done();
    require(!gpu.has_events(), "copies that nobody waits for");
    require(
        std::accumulate(registers.begin(), registers.end(), 0) <= 64 * 1024,
        "more registers than there are");
  }
};

inline std::unique_ptr<Sm90> sm90;

}  // namespace emulated

namespace cac_fast::cuda::sm90 {

using TensorMap = Boxes;

alignas(1024) inline char shared_memory[256 * 1024];

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(
      static_cast<const char*>(pointer) - shared_memory + emulated::kSharedStart);
}

inline void barrier_init(uint32_t barrier, int arrivals) {
  emulated::sm90->barriers.init(barrier, static_cast<unsigned>(arrivals));
}
inline void barriers_ready() { emulated::sm90->barriers.make_ready(); }
inline void barrier_arrive(uint32_t barrier) { emulated::sm90->barriers.arrive(barrier); }
inline void barrier_expect(uint32_t barrier, int bytes) {
  emulated::sm90->barriers.expect(barrier, bytes);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  emulated::sm90->barriers.wait(barrier, parity);
}

inline void copy_box(
    uint32_t shared, const TensorMap& map, uint32_t barrier, int channel, int row) {
  emulated::sm90->copies.issue(shared_memory, shared, map, barrier, channel, row);
}

template <int kRegisters>
void give_up_registers() {
  emulated::sm90->set_registers(kRegisters);
}
template <int kRegisters>
void take_registers() {
  emulated::sm90->set_registers(kRegisters);
}

inline void numbered_arrive(int number) { emulated::sm90->numbered.arrive(number); }
inline void numbered_wait(int number) { emulated::sm90->numbered.wait(number); }

inline void products_fence() { emulated::sm90->warpgroup().fence(); }
inline void products_commit() { emulated::sm90->warpgroup().commit(); }
template <int kPending>
void products_wait() {
  emulated::sm90->warpgroup().wait(kPending);
}
template <class Registers>
void hold_in_place(Registers&) {}

template <class Element>
float number_of(uint16_t bits) {
  return static_cast<float>(Element(bits, Element::from_bits()));
}

template <class Element, int n>
void multiply(float (&d)[n][4], uint64_t a, uint64_t b, bool add) {
  emulated::sm90->warpgroup().issue(
      shared_memory, {8 * n, a, b, add, number_of<Element>}, d[0], nullptr);
}

template <class Element, int n>
void multiply_add(float (&d)[n][4], const uint32_t (&a)[4], uint64_t b) {
  emulated::sm90->warpgroup().issue(
      shared_memory, {8 * n, 0, b, true, number_of<Element>}, d[0], a);
}

// Runs `body` as every thread of one program, and holds it to leave nothing behind.
template <class Body>
void run_program(unsigned threads, const Body& body) {
  std::memset(shared_memory, 0xFF, sizeof shared_memory);
  emulated::gpu.drop_events();
  emulated::sm90 = std::make_unique<emulated::Sm90>();
  emulated::sm90->registers.assign(threads, 168);
  emulated::gpu.run_program(threads, body);
  emulated::sm90->require_finished();
}

}  // namespace cac_fast::cuda::sm90
