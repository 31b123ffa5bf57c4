#include "plan.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace cac_fast {
namespace {

// Enough tasks to keep the cores of a large machine busy until the end.
constexpr int64_t kTasks = 128;
// Below this many tiles a task is not worth what it costs to combine.
constexpr int64_t kFewestTiles = 2;
// Labels closer together than this are counted rather than compared: classes always are.
constexpr int64_t kCountedRange = int64_t{1} << 16;

int64_t divide_up(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

// Spans without their negatives.
std::vector<Span> cut_rows(const std::vector<int64_t>& labels, int64_t height) {
  std::vector<Span> spans;
  const auto count = static_cast<int64_t>(labels.size());
  bool shared = false;
  for (int64_t begin = 0, end; begin < count; begin = end) {
    end = std::upper_bound(labels.begin() + begin, labels.end(), labels[begin]) - labels.begin();
    const int64_t rows = end - begin;
    if (2 * rows >= height) {
      const int64_t pieces = divide_up(rows, height);
      for (int64_t piece = 0; piece < pieces; ++piece) {
        spans.push_back({begin + rows * piece / pieces, begin + rows * (piece + 1) / pieces});
      }
      shared = false;
    } else if (shared && end - spans.back().begin <= height) {
      spans.back().end = end;
    } else {
      spans.push_back({begin, end});
      shared = true;
    }
  }
  return spans;
}

}  // namespace

Ordered order_by_label(std::vector<int64_t> rows, const int64_t* labels) {
  Ordered ordered;
  if (rows.empty()) {
    return ordered;
  }
  int64_t smallest = labels[rows[0]];
  int64_t largest = smallest;
  for (const int64_t row : rows) {
    smallest = std::min(smallest, labels[row]);
    largest = std::max(largest, labels[row]);
  }
  // Unsigned, as the difference of two labels may not fit.
  const uint64_t range = static_cast<uint64_t>(largest) - static_cast<uint64_t>(smallest);
  if (range < static_cast<uint64_t>(kCountedRange)) {
    std::vector<int64_t> next(range + 2, 0);
    for (const int64_t row : rows) {
      ++next[labels[row] - smallest + 1];
    }
    std::partial_sum(next.begin(), next.end(), next.begin());
    ordered.rows.resize(rows.size());
    for (const int64_t row : rows) {
      ordered.rows[next[labels[row] - smallest]++] = row;
    }
  } else {
    std::stable_sort(rows.begin(), rows.end(), [labels](int64_t one, int64_t other) {
      return labels[one] < labels[other];
    });
    ordered.rows = std::move(rows);
  }
  ordered.labels.reserve(ordered.rows.size());
  for (const int64_t row : ordered.rows) {
    ordered.labels.push_back(labels[row]);
  }
  return ordered;
}

std::vector<Span> cut_spans(
    const std::vector<int64_t>& labels, const std::vector<int64_t>& negative_labels,
    int64_t height) {
  std::vector<Span> spans = cut_rows(labels, height);
  const auto first = negative_labels.begin(), behind = negative_labels.end();
  for (Span& span : spans) {
    const int64_t smallest = labels[span.begin], largest = labels[span.end - 1];
    span.low = std::lower_bound(first, behind, smallest) - first;
    span.high = std::upper_bound(first, behind, largest) - first;
    span.middle_end = smallest == largest ? span.low : span.high;
    span.count = behind - first;
  }
  return spans;
}

std::vector<Task> split(const std::vector<Span>& spans, int64_t height, int64_t width) {
  int64_t pairs = 0;
  for (const Span& span : spans) {
    pairs += span.rows() * span.columns();
  }
  const int64_t tiles = std::max(divide_up(pairs, kTasks * height * width), kFewestTiles);
  std::vector<Task> tasks;
  for (size_t i = 0; i < spans.size(); ++i) {
    const int64_t columns = spans[i].columns();
    const int64_t step = tiles * width;
    for (int64_t part = 0, begin = 0; begin < columns; ++part, begin += step) {
      tasks.push_back({static_cast<int64_t>(i), part, begin, std::min(begin + step, columns)});
    }
  }
  return tasks;
}

}  // namespace cac_fast
