// cac_fast::dc_loss_rows_cpp: loss and gradient of Eq. 5 in one pass over the negatives.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "one_thread.h"
#include "plan.h"
#include "row_ops.h"

namespace cac_fast {
namespace {

using at::Tensor;

constexpr int64_t kTileRows = 256;
constexpr int64_t kTileColumns = 1024;

constexpr double kLog2E = 1.4426950408889634;

// Sums of e^{logit} over any number of negatives stay normal numbers up to this logit, so that no
// offset is needed (logits are at most 1/tau in size).
template <typename T>
constexpr double kLargestLogit = std::is_same_v<T, double> ? 600.0 : 64.0;

// Rows of a matrix with any strides.
template <typename scalar_t>
struct Rows {
  explicit Rows(const Tensor& matrix)
      : data(matrix.const_data_ptr<scalar_t>()),
        row_stride(matrix.stride(0)),
        stride(matrix.stride(1)),
        size(matrix.size(1)) {}

  const scalar_t* operator[](int64_t row) const { return data + row * row_stride; }

  const scalar_t* data;
  int64_t row_stride, stride, size;
};

// Per anchor of a span, over the negatives added so far: the sum of 2^(logit - offset), the sum of
// 2^(logit - offset) n, and the offset, all with logits in units of log 2.
template <typename T>
struct Sums {
  std::vector<double> total;
  std::vector<T> offset;
  Tensor weighted;
};

// One call of the operator; `scalar_t` is the features' dtype, T the one of sums and weights, and
// P that of the factors in products: T, or bfloat16 where the CPU has units for it.
template <typename scalar_t, typename P = at::opmath_type<scalar_t>>
class Loss {
  using T = at::opmath_type<scalar_t>;
  static constexpr bool kUnits = !std::is_same_v<P, T>;
  static_assert(!kUnits || std::is_same_v<P, scalar_t>);

 public:
  Loss(
      const Tensor& anchors, const Tensor& positives, const Tensor& negatives,
      const int64_t* anchor_labels, const int64_t* negative_labels, const bool* active,
      double temperature, const Tensor& loss, const Tensor& gradient)
      : anchors_(anchors),
        positives_(positives),
        dim_(anchors.size(1)),
        temperature_(temperature),
        scale_(static_cast<T>(kLog2E / temperature)),
        moving_(1 / temperature > kLargestLogit<T>),
        options_(anchors.options().dtype(c10::CppTypeToScalarType<T>::value)),
        loss_(loss.mutable_data_ptr<T>()),
        gradient_(gradient.mutable_data_ptr<scalar_t>()) {
    std::vector<int64_t> rows;
    for (int64_t i = 0; i < anchors.size(0); ++i) {
      if (active[i]) rows.push_back(i);
    }
    order_ = order_by_label(std::move(rows), anchor_labels);
    std::vector<int64_t> columns;
    for (int64_t j = 0; j < negatives.size(0); ++j) {
      if (negative_labels[j] >= 0) columns.push_back(j);
    }
    const Ordered admitted = order_by_label(std::move(columns), negative_labels);

    spans_ = cut_spans(order_.labels, admitted.labels, kTileRows);
    tasks_ = split(spans_, kTileRows, kTileColumns);
    if (tasks_.empty()) return;
    find_excluded(admitted.labels);
    gather(Rows<scalar_t>(negatives), admitted.rows, negatives.options());
    if constexpr (kUnits) transposed_ = negatives_.t().contiguous();
  }

  void run() {
    std::vector<std::vector<Sums<T>>> parts(spans_.size());
    std::vector<std::atomic<int64_t>> missing(spans_.size());
    for (const Task& task : tasks_) {
      parts[task.span].emplace_back();
      ++missing[task.span];
    }
    std::atomic<int64_t> next{0};
    // Each worker takes the next task, as tasks and cores differ in speed. What a task computes
    // does not depend on who computes it, and whoever ends a span adds its parts in their order.
    at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
      const at::AutoDispatchBelowADInplaceOrView guard;
      const OneThread one_thread;
      Workspace workspace;
      for (size_t i; (i = next++) < tasks_.size();) {
        const Task& task = tasks_[i];
        std::vector<Sums<T>>& sums = parts[task.span];
        sums[task.part] = add_up(task, workspace);
        if (--missing[task.span] == 0) {
          finish(spans_[task.span], combine(sums));
          sums.clear();
        }
      }
    });
  }

 private:
  struct Workspace {
    Tensor anchors, logits, weights, converted;
  };

  // A buffer of the workspace, made where it is asked for first.
  static const Tensor& made(Tensor& kept, at::IntArrayRef sizes, const at::TensorOptions& options) {
    if (!kept.defined()) kept = at::empty(sizes, options);
    return kept;
  }

  // The ordered negatives of each anchor's own label.
  void find_excluded(const std::vector<int64_t>& negative_labels) {
    excluded_.reserve(order_.size());
    for (const int64_t label : order_.labels) {
      const auto [begin, end] =
          std::equal_range(negative_labels.begin(), negative_labels.end(), label);
      excluded_.emplace_back(begin - negative_labels.begin(), end - negative_labels.begin());
    }
  }

  void gather(
      const Rows<scalar_t>& from, const std::vector<int64_t>& rows,
      const at::TensorOptions& options) {
    negatives_ = at::empty({static_cast<int64_t>(rows.size()), dim_}, options);
    auto* const to = negatives_.template mutable_data_ptr<scalar_t>();
    at::parallel_for(0, negatives_.size(0), 1024, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const scalar_t* const row = from[rows[i]];
        for (int64_t d = 0; d < dim_; ++d) to[i * dim_ + d] = row[d * from.stride];
      }
    });
  }

  // The anchors of a span, one after the other.
  Tensor gathered(const Span& span, Workspace& workspace) const {
    const Tensor& anchors = made(
        workspace.anchors, {kTileRows, dim_}, options_.dtype(c10::CppTypeToScalarType<P>::value));
    P* to = anchors.mutable_data_ptr<P>();
    for (int64_t i = span.begin; i < span.end; ++i) {
      const scalar_t* const row = anchors_[order_.rows[i]];
      for (int64_t d = 0; d < dim_; ++d) *to++ = static_cast<P>(row[d * anchors_.stride]);
    }
    return anchors.narrow(0, 0, span.rows());
  }

  Sums<T> add_up(const Task& task, Workspace& workspace) const {
    const Span& span = spans_[task.span];
    const int64_t rows = span.rows();
    const Tensor anchors = gathered(span, workspace);
    const Tensor& tile = made(workspace.logits, {kTileRows * kTileColumns}, options_);
    const T start = moving_ ? -std::numeric_limits<T>::infinity() : T(0);
    Sums<T> sums{
        std::vector<double>(rows, 0.0), std::vector<T>(rows, start),
        at::zeros({rows, dim_}, options_)};
    for (int64_t column = task.begin; column < task.end;) {
      // A tile lies on one side of the negatives that the span leaves out.
      const bool before = column < span.middle_end;
      const int64_t side_end = before ? std::min(task.end, span.middle_end) : task.end;
      const int64_t width = std::min(kTileColumns, side_end - column);
      const int64_t first = before ? column : column - span.middle_end + span.high;
      Tensor logits = tile.narrow(0, 0, rows * width).view({rows, width});
      if constexpr (kUnits) {
        multiply(anchors, transposed_.narrow(1, first, width), logits, false);
        weigh(span, first, width, logits.mutable_data_ptr<T>(), sums);
        multiply(
            rounded(logits, workspace), negatives_.narrow(0, first, width), sums.weighted, true);
      } else {
        const Tensor part = converted(negatives_.narrow(0, first, width), workspace);
        at::cpu::mm_out(logits, anchors, part.t());
        weigh(span, first, width, logits.mutable_data_ptr<T>(), sums);
        at::cpu::addmm_out(sums.weighted, sums.weighted, logits, part);
      }
      column += width;
    }
    return sums;
  }

  // to (+)= left * right, with sums in float32: at::mm would round them to the factors' dtype.
  static void multiply(const Tensor& left, const Tensor& right, Tensor& to, bool add) {
    at::native::cpublas::brgemm(
        left.size(0), right.size(1), left.size(1), left.stride(0), right.stride(0), to.stride(0),
        add, left.const_data_ptr<P>(), right.const_data_ptr<P>(), to.mutable_data_ptr<float>(),
        /*is_vnni=*/false);
  }

  // Weights in the dtype of the products.
  static Tensor rounded(const Tensor& weights, Workspace& workspace) {
    const auto options = weights.options().dtype(c10::CppTypeToScalarType<P>::value);
    return made(workspace.weights, {kTileRows * kTileColumns}, options)
        .narrow(0, 0, weights.numel())
        .view_as(weights)
        .copy_(weights);
  }

  // Negatives in the dtype that is computed in.
  Tensor converted(const Tensor& part, Workspace& workspace) const {
    if (std::is_same_v<scalar_t, T>) return part;
    return made(workspace.converted, {kTileColumns, dim_}, options_)
        .narrow(0, 0, part.size(0))
        .copy_(part);
  }

  // Turns the logits of a tile into weights, and adds these to the totals.
  void weigh(const Span& span, int64_t first, int64_t width, T* logits, Sums<T>& sums) const {
    for (int64_t i = 0; i < span.rows(); ++i, logits += width) {
      // Ordered as they are, the negatives of the anchor's own label are neighbors.
      const auto [excluded_from, excluded_to] = excluded_[span.begin + i];
      const int64_t left = std::clamp<int64_t>(excluded_from - first, 0, width);
      const int64_t right = std::clamp<int64_t>(excluded_to - first, left, width);
      std::fill(logits + left, logits + right, T(0));
      if (moving_) raise_offset(i, logits, left, right, width, sums);
      sums.total[i] += exp2_sum(logits, left, scale_, sums.offset[i]);
      sums.total[i] += exp2_sum(logits + right, width - right, scale_, sums.offset[i]);
    }
  }

  // Makes the offset the running maximum, and brings the sums so far to the new one.
  void raise_offset(
      int64_t i, const T* logits, int64_t left, int64_t right, int64_t width,
      Sums<T>& sums) const {
    const T old = sums.offset[i];
    T offset = old;
    if (left > 0) offset = std::max(offset, scale_ * largest(logits, left));
    if (right < width) {
      offset = std::max(offset, scale_ * largest(logits + right, width - right));
    }
    if (offset == old) return;
    shrink(i, std::exp2(old - offset), sums);
    sums.offset[i] = offset;
  }

  void shrink(int64_t i, T factor, Sums<T>& sums) const {
    sums.total[i] *= factor;
    T* const row = sums.weighted.template mutable_data_ptr<T>() + i * dim_;
    for (int64_t d = 0; d < dim_; ++d) row[d] *= factor;
  }

  // Adds the parts of a span, always in the same order.
  Sums<T> combine(std::vector<Sums<T>>& parts) const {
    Sums<T> sums = std::move(parts[0]);
    T* const to = sums.weighted.template mutable_data_ptr<T>();
    const auto rows = static_cast<int64_t>(sums.total.size());
    for (size_t p = 1; p < parts.size(); ++p) {
      const T* const from = parts[p].weighted.template const_data_ptr<T>();
      for (int64_t i = 0; i < rows; ++i) {
        T factor = 1;
        if (parts[p].offset[i] > sums.offset[i]) {
          shrink(i, std::exp2(sums.offset[i] - parts[p].offset[i]), sums);
          sums.offset[i] = parts[p].offset[i];
        } else if (parts[p].offset[i] < sums.offset[i]) {
          factor = std::exp2(parts[p].offset[i] - sums.offset[i]);
        }
        sums.total[i] += factor * parts[p].total[i];
        for (int64_t d = 0; d < dim_; ++d) to[i * dim_ + d] += factor * from[i * dim_ + d];
      }
    }
    return sums;
  }

  // loss = log(1 + e^x), gradient = sigmoid(x) / tau (mean - p), x = log total - a.p / tau.
  void finish(const Span& span, const Sums<T>& sums) const {
    const T* const weighted = sums.weighted.template const_data_ptr<T>();
    for (int64_t i = 0; i < span.rows(); ++i) {
      const double total = sums.total[i];
      if (total == 0) continue;
      const int64_t row = order_.rows[span.begin + i];
      const scalar_t* const anchor = anchors_[row];
      const scalar_t* const positive = positives_[row];
      double cosine = 0;
      for (int64_t d = 0; d < dim_; ++d) {
        cosine += static_cast<double>(anchor[d * anchors_.stride]) *
            static_cast<double>(positive[d * positives_.stride]);
      }
      // Scaled as the products with the negatives, so that equal features give equal logits.
      const double x = (std::log2(total) + sums.offset[i] - scale_ * cosine) / kLog2E;
      const double small = std::exp(-std::abs(x));
      loss_[row] = static_cast<T>(std::max(x, 0.0) + std::log1p(small));
      const double pull = (x > 0 ? 1 : small) / (1 + small) / temperature_;
      scalar_t* const to = gradient_ + row * dim_;
      for (int64_t d = 0; d < dim_; ++d) {
        const double mean = weighted[i * dim_ + d] / total;
        const auto p = static_cast<double>(positive[d * positives_.stride]);
        to[d] = static_cast<scalar_t>(pull * (mean - p));
      }
    }
  }

  Rows<scalar_t> anchors_, positives_;
  int64_t dim_;
  double temperature_;
  T scale_;  // logits of unit vectors, in units of log 2
  bool moving_;
  at::TensorOptions options_;
  T* loss_;
  scalar_t* gradient_;
  Ordered order_;
  std::vector<Span> spans_;
  std::vector<Task> tasks_;
  std::vector<std::pair<int64_t, int64_t>> excluded_;
  Tensor negatives_, transposed_;
};

std::tuple<Tensor, Tensor> dc_loss_rows_cpp(
    const Tensor& anchors, const Tensor& positives, const Tensor& negatives,
    const Tensor& anchor_labels, const Tensor& negative_labels, const Tensor& active,
    double temperature, bool bfloat16_units) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Tensor labels = anchor_labels.contiguous(), others = negative_labels.contiguous();
  const Tensor rows = active.contiguous();
  const auto accumulated = anchors.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor loss = at::zeros({anchors.size(0)}, anchors.options().dtype(accumulated));
  const Tensor gradient = at::zeros(anchors.sizes(), anchors.options());
  const auto run = [&](auto type) {
    typename decltype(type)::type call(
        anchors, positives, negatives, labels.const_data_ptr<int64_t>(),
        others.const_data_ptr<int64_t>(), rows.const_data_ptr<bool>(), temperature, loss, gradient);
    call.run();
  };
  if (bfloat16_units && anchors.scalar_type() == at::kBFloat16) {
    run(std::type_identity<Loss<at::BFloat16, at::BFloat16>>());
  } else {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kBFloat16, at::kHalf, anchors.scalar_type(), "dc_loss_rows_cpp",
        [&] { run(std::type_identity<Loss<scalar_t>>()); });
  }
  return {loss, gradient};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cac_fast, library) {
  library.def(
      "dc_loss_rows_cpp(Tensor anchors, Tensor positives, Tensor negatives, Tensor anchor_labels, "
      "Tensor negative_labels, Tensor active, float temperature, bool bfloat16_units) -> "
      "(Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(cac_fast, CPU, library) {
  library.impl("dc_loss_rows_cpp", &dc_loss_rows_cpp);
}

}  // namespace cac_fast
