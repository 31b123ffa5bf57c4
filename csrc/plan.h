// What has to be multiplied: anchors and negatives ordered by label, cut into tasks.
#pragma once

#include <cstdint>
#include <vector>

namespace cac_fast {

// Rows in the order of their labels; rows of one label keep their order.
struct Ordered {
  std::vector<int64_t> rows;
  std::vector<int64_t> labels;

  int64_t size() const { return static_cast<int64_t>(rows.size()); }
};

// Orders the `rows` given by `labels[row]`.
Ordered order_by_label(std::vector<int64_t> rows, const int64_t* labels);

// Ordered anchors [begin, end) and the ordered negatives they meet, as three intervals.
//
// Negatives [0, low) and [high, count) have labels that none of these anchors has. [low, high)
// have labels from the smallest to the largest of the anchors': each anchor excludes a part
// of them. With one label only that part is all of them, and `middle_end` is `low`, not `high`.
struct Span {
  int64_t begin, end;
  int64_t low, middle_end, high, count;

  int64_t rows() const { return end - begin; }
  int64_t columns() const { return middle_end + count - high; }
};

// Cuts ordered anchors into spans of at most `height` rows, at label borders where it pays: a label
// with at least half a span of anchors gets spans of its own, and so skips its negatives.
std::vector<Span> cut_spans(
    const std::vector<int64_t>& labels, const std::vector<int64_t>& negative_labels,
    int64_t height);

// Columns [begin, end) of a span, counted over its intervals; `part` is its number in the span.
struct Task {
  int64_t span, part;
  int64_t begin, end;
};

// Splits the spans over their negatives into tasks of whole tiles, by a rule of the sizes alone, so
// that results do not depend on the number of threads. A span without negatives has no task.
std::vector<Task> split(const std::vector<Span>& spans, int64_t height, int64_t width);

}  // namespace cac_fast
