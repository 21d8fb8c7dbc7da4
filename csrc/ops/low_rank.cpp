#include "ops/low_rank.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>

#include "launch/low_rank.h"
#include "metal/encoder.h"
#include "ops/fail.h"
#include "ops/matmul.h"

namespace optiq {
namespace {

constexpr int kRanks = 8;  // as the kernel wants them
constexpr int kArrays = 3; // of a term

template <class... Parts>
[[noreturn]] void fail_terms(Parts&&... parts) {
  fail("gathered_low_rank", parts...);
}

class GatheredLowRank : public mx::UnaryPrimitive {
 public:
  GatheredLowRank(mx::Stream stream, TermsOfRows terms, int in, int out)
      : UnaryPrimitive(stream), terms_(std::move(terms)), in_(in), out_(out) {}

  void eval_cpu(const std::vector<array>& inputs, array& out) override {
    array x = row_contiguous(inputs[0], stream());
    out.set_data(mx::allocator::malloc(out.nbytes()));
    auto& encoder = mx::cpu::get_command_encoder(stream());
    encoder.set_input_array(x);
    encoder.set_output_array(out);
    encoder.dispatch([terms = terms_, in = in_, width = out_, m = x.shape(0), x = x.data<float>(),
                         y = out.data<float>()]() {
      std::fill_n(y, size_t(m) * width, 0.0f);
      cpu::Adapters adapters = terms.get();
      cpu::LowRankPart part{adapters.terms[0], y, width};
      cpu::kernels().low_rank({x, m, in, adapters.slots, &part, 1});
    });
  }
  void eval_gpu(const std::vector<array>&, array&) override {
    throw std::runtime_error("[gathered_low_rank] takes stacked terms on a GPU");
  }
  DEFINE_NAME(OptiqGatheredLowRank)

 private:
  TermsOfRows terms_;
  int in_, out_;
};

class StackedLowRank : public mx::UnaryPrimitive {
 public:
  using mx::UnaryPrimitive::UnaryPrimitive;

  void eval_cpu(const std::vector<array>& inputs, array& out) override {
    std::vector<array> in;
    auto& encoder = mx::cpu::get_command_encoder(stream());
    for (const array& each : inputs) {
      encoder.set_input_array(in.emplace_back(row_contiguous(each, stream())));
    }
    out.set_data(mx::allocator::malloc(out.nbytes()));
    encoder.set_output_array(out);
    int rank = in[1].shape(2), count = in[1].shape(0);
    std::vector<cpu::LowRank> terms(count, cpu::LowRank{});
    for (int slot = 1; slot < count; slot++) {
      terms[slot] = {in[1].data<char>() + slot * (in[1].nbytes() / count),
          in[2].data<char>() + slot * (in[2].nbytes() / count), float_type(in[1].dtype()), rank};
    }
    encoder.dispatch(
        [terms, m = in[0].shape(0), k = in[0].shape(1), width = out.shape(1),
            x = in[0].data<float>(), slots = in[3].data<uint32_t>(), y = out.data<float>()]() {
          std::vector<int> of_rows(slots, slots + m);
          for (int i = 0; i < m; i++) {
            bool there = slots[i] < terms.size();
            std::fill_n(y + size_t(i) * width, width, there ? 0.0f : NAN);
            of_rows[i] = there ? of_rows[i] : 0;
          }
          cpu::LowRankPart part{terms.data(), y, width};
          cpu::kernels().low_rank({x, m, k, of_rows.data(), &part, 1});
        });
  }
  void eval_gpu(const std::vector<array>& inputs, array& out) override {
    const array &x = inputs[0], &a = inputs[1];
    launch::LowRankOp op{
        x.shape(0), x.shape(1), out.shape(1), a.shape(2), a.shape(0), float_type(a.dtype())};
    metal::run(launch::plan_low_rank(op), inputs, {out}, stream());
  }
  DEFINE_NAME(OptiqStackedLowRank)
};

} // namespace

LowRankTerms::LowRankTerms(int slots, int in, int out) : in(in), out(out) {
  if (slots < 1 || in < 1 || out < 1) {
    fail_terms(slots, " slots for a layer of ", in, " to ", out, "; all must be positive");
  }
  auto empty = std::make_shared<Table>();
  empty->terms.resize(slots, cpu::LowRank{});
  empty->kept.resize(kArrays * size_t(slots), array(0.0f));
  table_ = std::move(empty);
}

std::shared_ptr<LowRankTerms::Table> LowRankTerms::changed(int slot) {
  if (slot < 1 || slot >= int(table_->terms.size())) {
    fail_terms("slot ", slot, " is not one of 1 to ", table_->terms.size() - 1);
  }
  return std::make_shared<Table>(*table_);
}

void LowRankTerms::put(int slot, const array& a, const array& b, const std::optional<array>& gain) {
  auto table = changed(slot);
  for (const array* m : {&a, &b}) {
    if (m->ndim() != 2 || (m->dtype() != mx::float32 && m->dtype() != mx::float16) ||
        !m->is_available() || !m->flags().row_contiguous) {
      fail_terms("a term holds ", m->shape(), " ", m->dtype(),
          "; it must be a matrix in float32 or float16, evaluated and contiguous");
    }
  }
  int rank = a.shape(1);
  if (a.shape(0) != in || b.shape(1) != out || b.shape(0) != rank || a.dtype() != b.dtype() ||
      rank < kRanks || rank % kRanks != 0) {
    fail_terms("a is ", a.shape(), " ", a.dtype(), " and b ", b.shape(), " ", b.dtype(),
        "; they must be [", in, ", rank] and [rank, ", out,
        "] of one dtype, with a rank that is a multiple of ", kRanks);
  }
  if (gain && (gain->shape() != mx::Shape{out} || gain->dtype() != mx::float32 ||
                  !gain->is_available() || !gain->flags().row_contiguous)) {
    fail_terms("gain is ", gain->shape(), " ", gain->dtype(), "; it must be [", out,
        "] in float32, evaluated and contiguous");
  }
  table->terms[slot] = {a.data<char>(), b.data<char>(), float_type(a.dtype()), rank,
      gain ? gain->data<float>() : nullptr};
  std::array kept = {a, b, gain.value_or(array(0.0f))};
  std::copy(kept.begin(), kept.end(), table->kept.begin() + kArrays * slot);
  table_ = std::move(table);
}

void LowRankTerms::clear(int slot) {
  auto table = changed(slot);
  table->terms[slot] = {};
  std::fill_n(table->kept.begin() + kArrays * slot, kArrays, array(0.0f));
  table_ = std::move(table);
}

TermsOfRows::TermsOfRows(
    const std::vector<TermsPtr>& layers, const std::vector<int>& slots, int rows) {
  for (int slot : slots) {
    slots_.insert(slots_.end(), rows, slot);
  }
  for (const TermsPtr& layer : layers) {
    auto& table = tables_.emplace_back(layer ? layer->table() : nullptr);
    terms_.push_back(table ? table->terms.data() : nullptr);
    for (int slot : slots) {
      if (table && (slot < 0 || slot >= int(table->terms.size()))) {
        fail_terms("slot ", slot, " is not one of 0 to ", table->terms.size() - 1);
      }
    }
  }
}

array gathered_low_rank(const array& x, const LowRankTerms& terms, const std::vector<int>& slots,
    mx::StreamOrDevice s) {
  if (x.ndim() != 2 || x.shape(1) != terms.in || x.dtype() != mx::float32) {
    fail_terms("x is ", x.shape(), " ", x.dtype(), "; it must be [rows, ", terms.in, "] float32");
  }
  if (slots.empty() || x.shape(0) % slots.size() != 0) {
    fail_terms(slots.size(), " slots do not go into ", x.shape(0), " rows");
  }
  TermsOfRows of_rows(
      {std::make_shared<LowRankTerms>(terms)}, slots, x.shape(0) / int(slots.size()));
  return array({x.shape(0), terms.out}, mx::float32,
      std::make_shared<GatheredLowRank>(mx::to_stream(s), std::move(of_rows), terms.in, terms.out),
      {x});
}

array gathered_low_rank(
    const array& x, const array& a, const array& b, const array& slots, mx::StreamOrDevice s) {
  if (x.ndim() != 2 || x.dtype() != mx::float32 || slots.ndim() != 1 ||
      slots.dtype() != mx::uint32 || slots.shape(0) != x.shape(0)) {
    fail_terms("x is ", x.shape(), " ", x.dtype(), " and slots ", slots.shape(), " ", slots.dtype(),
        "; they must be [rows, in] float32 and [rows] uint32");
  }
  if (a.ndim() != 3 || b.ndim() != 3 || a.shape(0) != b.shape(0) || a.shape(1) != x.shape(1) ||
      a.shape(2) != b.shape(1) || a.shape(2) < kRanks || a.shape(2) % kRanks != 0 ||
      a.dtype() != b.dtype() || (a.dtype() != mx::float32 && a.dtype() != mx::float16)) {
    fail_terms("a is ", a.shape(), " ", a.dtype(), " and b ", b.shape(), " ", b.dtype(),
        "; they must be [slots, ", x.shape(1),
        ", rank] and [slots, rank, out], both float32 or float16, with a rank that is a multiple "
        "of ",
        kRanks);
  }
  return array({x.shape(0), b.shape(2)}, mx::float32,
      std::make_shared<StackedLowRank>(mx::to_stream(s)), {x, a, b, slots});
}

void to_half(
    const float* from, float factor, size_t rows, size_t cols, uint16_t* to, size_t stride) {
  if (stride == cols) { // one long row
    cols *= rows;
    rows = 1;
  }
  float scaled[1024];
  for (size_t i = 0; i < rows; i++) {
    for (size_t at = 0; at < cols; at += std::size(scaled)) {
      size_t n = std::min(cols - at, std::size(scaled));
      for (size_t j = 0; j < n; j++) {
        scaled[j] = factor * from[i * cols + at + j];
      }
      cpu::kernels().from_f32(scaled, cpu::Float::f16, to + i * stride + at, n);
    }
  }
}

void use_large_pages(const array& a) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  constexpr int kCollapse = 25; // MADV_COLLAPSE, which older headers do not know
  auto begin = (reinterpret_cast<uintptr_t>(a.data<char>()) + kPage - 1) / kPage * kPage;
  auto end = (reinterpret_cast<uintptr_t>(a.data<char>()) + a.nbytes()) / kPage * kPage;
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
  }
#endif
}

} // namespace optiq
