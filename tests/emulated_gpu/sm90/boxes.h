// TMA on the emulated GPU: boxes of a matrix of 16 bits, to shared memory with the 128-byte
// swizzle. They arrive soon, or when nothing else can be done; until then there is NaN.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "barriers.h"
#include "sm90/layout.h"

namespace emulated {

using cac_fast::cuda::sm90::Boxes;

// Chunks of 16 bytes exchanged by the number of the 128 bytes they lie in.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// What the driver demands of a tensor map with this swizzle.
inline void require_valid(const Boxes& boxes) {
  require(reinterpret_cast<uintptr_t>(boxes.features) % 16 == 0, "features not aligned");
  require(boxes.pitch % 16 == 0 && boxes.pitch >= 2 * boxes.channels, "a pitch that is none");
  require(boxes.channels > 0 && boxes.count > 0, "an empty matrix");
  require(boxes.box_channels * 2 <= 128, "a box wider than the swizzle");
  require(boxes.box_rows > 0 && boxes.box_rows <= 256, "a box too high");
}

class Copies {
 public:
  explicit Copies(PhaseBarriers& barriers) : barriers_(barriers) {}

  void issue(
      char* memory, uint32_t to, const Boxes& boxes, uint32_t barrier, int channel, int row) {
    const uint32_t width = boxes.box_channels * 2, bytes = width * boxes.box_rows;
    require(to % 128 == 0, "a box not aligned to 128 bytes");
    require_inside(to, bytes);
    barriers_.require_none_within(to, bytes);
    for (const Range& other : under_way_) {
      require(to + bytes <= other.from || other.to <= to, "two copies on their way to one place");
    }
    under_way_.push_back({to, to + bytes});
    std::memset(memory + to - kSharedStart, 0xFF, bytes);
    gpu.later([=, this, boxes = boxes] {
      for (uint32_t y = 0; y < boxes.box_rows; ++y) {
        for (uint32_t x = 0; x < boxes.box_channels; ++x) {
          const uint64_t column = channel + x, line = row + static_cast<uint64_t>(y);
          uint16_t value = 0;
          if (column < boxes.channels && line < boxes.count) {
            const auto* from = static_cast<const char*>(boxes.features);
            std::memcpy(&value, from + line * boxes.pitch + column * 2, sizeof value);
          }
          const uint32_t place = swizzled(to + y * width + x * 2);
          std::memcpy(memory + place - kSharedStart, &value, sizeof value);
        }
      }
      const auto is_this = [to](const Range& other) { return other.from == to; };
      under_way_.erase(std::find_if(under_way_.begin(), under_way_.end(), is_this));
      barriers_.complete(barrier, bytes);
    });
  }

 private:
  struct Range {
    uint32_t from, to;
  };

  PhaseBarriers& barriers_;
  std::vector<Range> under_way_;
};

}  // namespace emulated
