#include "ops/ranks.h"

#include <algorithm>
#include <vector>

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/primitives.h>
#include <mlx/utils.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "ops/fail.h"
#include "ops/matmul.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace optiq {
namespace {

// Work of all ranks on an array, which gives one with as many rows.
class Together : public mx::UnaryPrimitive {
 public:
  Together(mx::Stream stream, RanksPtr ranks, bool sum)
      : UnaryPrimitive(stream), ranks_(std::move(ranks)), sum_(sum) {}

  void eval_cpu(const std::vector<array>& inputs, array& out) override {
    array x = row_contiguous(inputs[0], stream());
    out.set_data(mx::allocator::malloc(out.nbytes()));
    mx::cpu::get_command_encoder(stream()).dispatch(
        [ranks = ranks_, sum = sum_, n = x.size(), width = size_t(x.shape(-1)), x = x.data<float>(),
            y = out.data<float>()] {
          if (sum) {
            std::copy_n(x, n, y);
            ranks->total(y, n);
          } else {
            ranks->side_by_side(x, n / width, width, y);
          }
        });
  }
  void eval_gpu(const std::vector<array>&, array&) override {
    throw std::runtime_error("[ranks] meets on the CPU");
  }
  DEFINE_NAME(OptiqRanks)

 private:
  RanksPtr ranks_;
  bool sum_;
};

array together(const RanksPtr& ranks, const array& x, bool sum, mx::StreamOrDevice s) {
  if (x.ndim() == 0 || x.size() == 0 || x.dtype() != mx::float32) {
    fail("ranks", "x is ", x.shape(), " ", x.dtype(),
        "; it must be float32 and have one axis or more, none of them empty");
  }
  mx::Shape shape = x.shape();
  shape.back() *= sum ? 1 : ranks->size();
  return array(
      std::move(shape), mx::float32, std::make_shared<Together>(mx::to_stream(s), ranks, sum), {x});
}

} // namespace

void bind_ranks(nb::module_& m) {
  nb::class_<RanksHandle>(m, "Ranks")
      .def(
          "__init__",
          [](RanksHandle* self, int rank, int size, const std::vector<int>& connections) {
            new (self) RanksHandle{std::make_shared<cpu::Ranks>(rank, size, connections)};
          },
          "rank"_a, "size"_a, "connections"_a)
      .def(
          "total",
          [](const RanksHandle& h, const array& x, mx::StreamOrDevice s) {
            return together(h.ranks, x, true, s);
          },
          "x"_a, nb::kw_only(), "stream"_a = nb::none())
      .def(
          "side_by_side",
          [](const RanksHandle& h, const array& x, mx::StreamOrDevice s) {
            return together(h.ranks, x, false, s);
          },
          "x"_a, nb::kw_only(), "stream"_a = nb::none());
}

} // namespace optiq
