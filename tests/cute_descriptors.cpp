// Holds csrc/cuda/sm90/layout.h against CuTe: where rows lie in shared memory, both descriptors,
// and how they move on from product to product. Exits with 1 if anything differs.

#include <cstdint>
#include <cstdio>

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "sm90/layout.h"

namespace {

using namespace cute;
namespace sm90 = cac_fast::cuda::sm90;
using Element = cutlass::bfloat16_t;

int differences = 0;

void require_equal(uint64_t mine, uint64_t theirs, const char* what, int rows, int channels) {
  if (mine == theirs) return;
  ++differences;
  std::printf(
      "%d x %d, %s: %llx here, %llx there\n", rows, channels, what,
      static_cast<unsigned long long>(mine), static_cast<unsigned long long>(theirs));
}

// Without the address, which CuTe knows on a GPU alone; where there is one slab, also without the
// way to the next.
uint64_t compared(uint64_t descriptor, int slabs) {
  return descriptor & ~uint64_t{0x3FFF} & ~(slabs > 1 ? 0 : uint64_t{0x3FFF} << 16);
}

template <int kRows, int kChannels>
void check() {
  constexpr int kSlabs = kChannels / sm90::kSlabChannels;
  static Element storage[1];
  const auto layout = tile_to_shape(
      GMMA::Layout_K_SW128_Atom<Element>{}, make_shape(Int<kRows>{}, Int<kChannels>{}));
  const auto places = as_position_independent_swizzle_layout(layout);
  for (int row = 0; row < kRows; ++row) {
    for (int channel = 0; channel < kChannels; ++channel) {
      const int slab = channel / sm90::kSlabChannels * (kRows * sm90::kSlabRow);
      const int chunk = channel % sm90::kSlabChannels / 8;
      const int byte =
          slab + cac_fast::cuda::chunk_offset(row, chunk, sm90::kSlabRow) + channel % 8 * 2;
      require_equal(byte, places(row, channel) * 2, "place", kRows, kChannels);
    }
  }

  const auto rows = make_tensor(make_smem_ptr(storage), layout);
  const auto by_channels =
      local_tile(rows, make_shape(Int<kRows>{}, Int<16>{}), make_coord(0, 0));
  require_equal(
      compared(sm90::over_channels(0), 2),
      compared(uint64_t(SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::K>(by_channels)), 2),
      "descriptor over channels", kRows, kChannels);

  const auto turned = composition(
      layout,
      make_layout(make_shape(Int<kChannels>{}, Int<kRows>{}), make_stride(Int<kRows>{}, Int<1>{})));
  const auto by_rows = local_tile(
      make_tensor(make_smem_ptr(storage), turned), make_shape(Int<kChannels>{}, Int<16>{}),
      make_coord(0, 0));
  require_equal(
      compared(sm90::over_rows(0, kRows), kSlabs),
      compared(uint64_t(SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::MN>(by_rows)), kSlabs),
      "descriptor over rows", kRows, kChannels);

  // A descriptor moves by where its first element lies.
  for (int step = 0; step < kChannels / sm90::kDepth; ++step) {
    require_equal(
        sm90::channels_step(step, kRows), places(0, step * sm90::kDepth) * 2, "step over channels",
        kRows, kChannels);
  }
  for (int step = 0; step < kRows / sm90::kDepth; ++step) {
    require_equal(
        sm90::rows_step(step), places(step * sm90::kDepth, 0) * 2, "step over rows", kRows,
        kChannels);
  }
}

}  // namespace

int main() {
  check<128, 64>();
  check<128, 128>();
  check<128, 256>();
  check<64, 256>();
  return differences > 0;
}
