// One kernel of csrc/cuda/sm90, or of a copy with a fault, on one case: a program with two tiles,
// and more blocks than two rounds of the ring. Exits with 0 if all sums are right, else with 1 and
// the reason.

#include <cmath>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../device.cuh"
#include "device.cuh"
// First, so that it is the emulation that the kernels get.
#include "sm90/shapes.cuh"

namespace {

using namespace cac_fast::cuda;
using Element = c10::BFloat16;
using Shape = sm90::BFloat16Shape<128>;
constexpr int kDim = Shape::kDim, kTiles = 2, kBlocks = 2 * Shape::kStages + 2;
constexpr int kAnchors = kTiles * Shape::kTile, kNegatives = kBlocks * Shape::kBlock;
constexpr int kAdmissible = kNegatives - 5;

std::vector<Element> draw(int rows, std::mt19937& random) {
  std::vector<Element> features(static_cast<size_t>(rows) * kDim);
  for (Element& feature : features) {
    feature = (static_cast<float>(random() % 2001) / 1000 - 1) / std::sqrt(kDim / 3.0F);
  }
  return features;
}

void require_close(double found, double expected, double size, const char* what) {
  if (std::abs(found - expected) <= 2e-3 * size) return;
  throw std::runtime_error(std::string(what) + " is wrong");
}

void run(unsigned seed) {
  std::mt19937 random{7};
  const auto anchors = draw(kAnchors, random), negatives = draw(kNegatives, random);
  // What all anchors exclude lies in the second block.
  const std::vector<int32_t> from(kAnchors, 130), to(kAnchors, 150);
  const int32_t num_active = kAnchors - 3, num_admissible = kAdmissible;
  const std::vector<int32_t> borders{1, 2, 2, 2, 1, 2, 2, 2};
  const std::vector<int64_t> ends{kBlocks, 2 * kBlocks};
  const int64_t share = 2 * kBlocks;
  const int32_t first_tile = 0, last_tile = kTiles - 1;
  constexpr size_t kRows = (kTiles + 1) * Shape::kTile;
  std::vector<float> weighted(kRows * kDim, NAN), total(kRows, NAN), offset(kRows, NAN);

  Operands given{};
  given.anchors = anchors.data();
  given.negatives = negatives.data();
  given.excluded_from = from.data();
  given.excluded_to = to.data();
  given.num_active = &num_active;
  given.num_admissible = &num_admissible;
  given.borders = borders.data();
  given.ends = ends.data();
  given.share = &share;
  given.first_tile = &first_tile;
  given.last_tile = &last_tile;
  given.weighted = weighted.data();
  given.total = total.data();
  given.offset = offset.data();
  given.count = kAnchors;
  given.tiles = kTiles;
  given.blocks = kBlocks;
  given.scale = 14.4F;
  given.lowest = -60;

  emulated::gpu.random.seed(seed);
  emulated::gpu.shared_bytes = Shape::kSharedBytes;
  const auto anchor_boxes = sm90::anchor_boxes<Shape>(given);
  const auto negative_boxes = sm90::negative_boxes<Shape>(given);
  emulated::require_valid(anchor_boxes);
  emulated::require_valid(negative_boxes);
  sm90::run_program(Shape::kThreads, [&] {
    sm90::dc_loss_partial_sm90<Shape, true>(given, anchor_boxes, negative_boxes);
  });

  for (int row = 0; row < num_active; row += 5) {
    std::vector<double> sums(kDim, 0);
    double sum = 0, size = 0;
    for (int column = 0; column < kAdmissible; ++column) {
      if (column >= 130 && column < 150) continue;
      double logit = 0;
      for (int i = 0; i < kDim; ++i) {
        logit += static_cast<double>(anchors[row * kDim + i]) * negatives[column * kDim + i];
      }
      const double weight = std::exp2(logit * given.scale - offset[row]);
      sum += weight;
      for (int i = 0; i < kDim; ++i) {
        sums[i] += weight * negatives[column * kDim + i];
        size = std::max(size, std::abs(sums[i]));
      }
    }
    require_close(total[row], sum, sum, "a total");
    for (int i = 0; i < kDim; ++i) {
      require_close(weighted[row * kDim + i], sums[i], size, "a sum");
    }
  }
}

}  // namespace

int main() {
  try {
    for (unsigned seed = 0; seed < 2; ++seed) run(seed);
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
  return 0;
}
