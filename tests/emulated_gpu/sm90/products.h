// wgmma on the emulated GPU. Operands in shared memory are found from their descriptors alone.
//
// A product is computed at once or only when it is waited for, at random; a left operand in
// registers is read then. Until the wait its results are NaN, and must stay so.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <vector>

#include "barriers.h"
#include "boxes.h"

namespace emulated {

constexpr unsigned kWarpgroup = 128, kRows = 64, kDepth = 16;

// What all threads of a warpgroup say alike.
struct Product {
  unsigned columns;
  uint64_t a, b;  // descriptors; `a` is 0 where it is in registers
  bool add;
  float (*number)(uint16_t);

  bool operator==(const Product& other) const {
    return columns == other.columns && a == other.a && b == other.b && add == other.add;
  }
};

// Of a matrix of 16 bits with the 128-byte swizzle.
class Operand {
 public:
  Operand(const char* memory, uint64_t descriptor)
      : memory_(memory),
        start_((descriptor & 0x3FFF) << 4),
        leading_((descriptor >> 16 & 0x3FFF) << 4),
        stride_((descriptor >> 32 & 0x3FFF) << 4) {
    require(descriptor >> 62 == 1, "a descriptor of another swizzle");
    require((descriptor >> 49 & 7) == 0, "a descriptor with a base offset");
  }

  // K-major: 8 rows of 128 bytes a group.
  uint16_t over_channels(uint32_t row, uint32_t k) const {
    require(start_ % 128 + 2 * kDepth <= 128, "a step beyond a slab");
    return at(start_ + row / 8 * stride_ + row % 8 * 128 + k * 2);
  }

  // MN-major: 64 columns a slab, 8 times 128 bytes a group.
  uint16_t over_rows(uint32_t column, uint32_t k) const {
    return at(start_ + column / 64 * leading_ + column % 64 * 2 + k / 8 * stride_ + k % 8 * 128);
  }

 private:
  uint16_t at(uint32_t address) const {
    require_inside(address, 2);
    uint16_t value;
    std::memcpy(&value, memory_ + swizzled(address) - kSharedStart, sizeof value);
    return value;
  }

  const char* memory_;
  uint32_t start_, leading_, stride_;
};

class Warpgroup {
 public:
  void fence() { mine().fenced = true; }
  void commit() { mine().groups.push_back(mine().issued); }

  void issue(const char* memory, const Product& product, float* d, const uint32_t* a) {
    Member& member = mine();
    require(member.fenced, "a product before the fence");
    if (member.issued == products_.size()) products_.push_back({product, memory, {}, {}});
    Issued& issued = products_[member.issued++];
    require(issued.product == product, "threads of a warpgroup issue different products");
    const unsigned count = product.columns / 2;
    if (member.results.count(d) == 0) {
      member.results.emplace(d, std::vector<float>(d, d + count));
      std::fill_n(d, count, std::numeric_limits<float>::quiet_NaN());
    }
    const unsigned i = gpu.index() % kWarpgroup;
    issued.d[i] = d;
    issued.a[i] = a;
    if (++issued.joined < kWarpgroup) return;
    ++issued.complete;
    if (gpu.random() % 2) compute(member.issued);
  }

  void wait(size_t pending) {
    Member& member = mine();
    member.fenced = false;
    gpu.dawdle();
    if (member.groups.size() <= pending) return;
    const size_t end = member.groups[member.groups.size() - pending - 1];
    for (size_t i = 0; i < end; ++i) {
      if (products_[i].complete == 0) gpu.wait_for_change(products_[i].complete);
    }
    compute(end);
    for (auto result = member.results.begin(); result != member.results.end();) {
      auto& [d, values] = *result;
      bool in_use = false;
      for (size_t i = end; i < member.issued; ++i) {
        in_use |= products_[i].d[gpu.index() % kWarpgroup] == d;
      }
      if (in_use) {
        ++result;
        continue;
      }
      for (size_t i = 0; i < values.size(); ++i) {
        require(std::isnan(d[i]), "results touched before the wait");
      }
      std::copy(values.begin(), values.end(), d);
      result = member.results.erase(result);
    }
    member.groups.erase(member.groups.begin(), member.groups.end() - pending);
  }

  void require_done() const {
    for (const Member& member : members_) {
      require(member.results.empty(), "products that nobody waits for");
    }
  }

 private:
  struct Member {
    bool fenced = false;
    size_t issued = 0;
    std::vector<size_t> groups;  // how many products had been issued at the end of each
    std::map<float*, std::vector<float>> results;
  };

  struct Issued {
    Product product;
    const char* memory;
    std::array<float*, kWarpgroup> d;
    std::array<const uint32_t*, kWarpgroup> a;
    unsigned joined = 0, complete = 0;
  };

  Member& mine() { return members_[gpu.index() % kWarpgroup]; }

  // In their order, up to the end-th.
  void compute(size_t end) {
    for (; computed_ < end; ++computed_) compute(products_[computed_]);
  }

  void compute(const Issued& issued) {
    const Product& product = issued.product;
    float left[kRows][kDepth], right[256][kDepth];
    const Operand b(issued.memory, product.b);
    for (unsigned n = 0; n < product.columns; ++n) {
      for (unsigned k = 0; k < kDepth; ++k) {
        right[n][k] = product.number(product.a ? b.over_channels(n, k) : b.over_rows(n, k));
      }
    }
    for (unsigned row = 0; row < kRows; ++row) {
      for (unsigned k = 0; k < kDepth; ++k) {
        if (product.a) {
          const Operand a(issued.memory, product.a);
          left[row][k] = product.number(a.over_channels(row, k));
        } else {
          // As in mma.m16n8k16: lane 4g + t holds k = 2t, 2t + 1 of row g, of row g + 8, then
          // the same of k + 8.
          const unsigned thread = row / 16 * 32 + row % 8 * 4 + k % 8 / 2;
          const uint32_t pair = issued.a[thread][k / 8 * 2 + row % 16 / 8];
          left[row][k] = product.number(static_cast<uint16_t>(pair >> k % 2 * 16));
        }
      }
    }
    for (unsigned thread = 0; thread < kWarpgroup; ++thread) {
      std::vector<float>& d = members_[thread].results.at(issued.d[thread]);
      for (unsigned i = 0; i < d.size(); ++i) {
        const unsigned row = thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8;
        const unsigned column = i / 4 * 8 + thread % 4 * 2 + i % 2;
        double sum = product.add ? d[i] : 0;
        for (unsigned k = 0; k < kDepth; ++k) {
          sum += static_cast<double>(left[row][k]) * right[column][k];
        }
        d[i] = static_cast<float>(sum);
      }
    }
  }

  std::array<Member, kWarpgroup> members_;
  std::deque<Issued> products_;
  size_t computed_ = 0;
};

}  // namespace emulated
