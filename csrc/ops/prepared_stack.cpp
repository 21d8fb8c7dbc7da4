// A stack of blocks over the caches of some sequences, prepared once for all their steps: Python
// does nothing for each block of a step.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "format_caster.h"
#include "ops/block_steps.h"
#include "ops/decoder_block_bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace optiq {
namespace {

int integer(nb::handle object, const char* name) {
  return nb::cast<int>(object.attr(name));
}

// One of mlx-lm's caches, or of their subclasses.
struct PreparedCache {
  nb::object object;
  bool rotating;

  // Where the stock class would put so many new rows of a cache with room for `size`; none where it
  // would make room first.
  std::optional<CachePlace> place(int rows, int size) const {
    int start = integer(object, "offset");
    if (!rotating) {
      return start + rows <= size ? std::optional(CachePlace{start, start + rows, start, rows})
                                  : std::nullopt;
    }
    int most = integer(object, "max_size"), next = integer(object, "_idx");
    bool whole = size == most;
    if (rows > 1 || !(whole || (start < size && size < most))) {
      return std::nullopt;
    }
    int at = whole && next == size ? integer(object, "keep") : next;
    return CachePlace{at, std::min(start + 1, size), start, 1};
  }

  // Notes that it holds the new rows.
  void advance(const CachePlace& place) const {
    object.attr("offset") = place.offset + place.rows;
    if (rotating) {
      object.attr("_idx") = place.start + 1;
    }
  }
};

struct PreparedBlock {
  nb::object handle; // a BlockHandle
  nb::tuple parents, keys, children;
  std::vector<PreparedCache> caches; // of each sequence
  AffineFormat k_format, v_format;
};

// What Python holds, for the same reason as a BlockHandle.
struct Ends {
  EndsPtr ends;
  std::vector<array> arrays; // of which it was made
};

class PreparedStack {
 public:
  // (block, (parents, keys, children), caches, whether each is rotating, formats of keys and
  // values)
  using Given = std::tuple<nb::object, std::tuple<nb::tuple, nb::tuple, nb::tuple>,
      std::vector<nb::object>, std::vector<bool>, std::pair<AffineFormat, AffineFormat>>;

  explicit PreparedStack(const std::vector<Given>& blocks) {
    for (const auto& [block, links, caches, rotating, formats] : blocks) {
      PreparedBlock& b = blocks_.emplace_back();
      b.handle = block;
      std::tie(b.parents, b.keys, b.children) = links;
      std::tie(b.k_format, b.v_format) = formats;
      for (size_t i = 0; i < caches.size(); i++) {
        b.caches.push_back({caches[i], rotating[i]});
      }
    }
  }

  // Whether all blocks have the parts that they had.
  bool unchanged() const {
    return std::all_of(blocks_.begin(), blocks_.end(), [](const PreparedBlock& b) {
      return nb::cast<const BlockHandle&>(b.handle).unchanged(b.parents, b.keys, b.children);
    });
  }

  // What the last block gives for so many rows of each sequence, or with `ends`, where x are
  // tokens, the norm after it. None where a cache has to make room first, or is held by something
  // else than what gives it, so that it may not be written to.
  std::optional<array> step(const array& x, const std::vector<int>& rows,
      const std::string& masking, const std::vector<int>& slots, const Ends& ends,
      mx::StreamOrDevice s) {
    std::vector<BlockStep> steps;
    for (const PreparedBlock& b : blocks_) {
      BlockStep& step = steps.emplace_back(BlockStep{nb::cast<const BlockHandle&>(b.handle).block,
          {}, {}, {}, {b.k_format, b.v_format, masking, {}, 0, {}, {}, {}}, slots});
      for (size_t i = 0; i < b.caches.size(); i++) {
        const PreparedCache& cache = b.caches[i];
        for (auto [name, to] : {std::pair("keys", &step.keys), {"values", &step.values}}) {
          nb::object object = cache.object.attr(name);
          const array& a = nb::cast<const array&>(object);
          if (!a.is_available() || !a.is_donatable() || Py_REFCNT(object.ptr()) > 2) {
            return std::nullopt;
          }
          to->push_back(a);
        }
        auto place = cache.place(rows[i], step.keys.back().shape(2));
        if (!place) {
          return std::nullopt;
        }
        step.places.push_back(*place);
      }
    }
    array out = block_stack(steps, x, ends.ends, s);
    places_.clear();
    for (BlockStep& step : steps) {
      places_.push_back(std::move(step.places));
    }
    return out;
  }

  // Notes that the caches hold what the last step gave.
  void advance() const {
    for (size_t b = 0; b < places_.size(); b++) {
      for (size_t i = 0; i < places_[b].size(); i++) {
        blocks_[b].caches[i].advance(places_[b][i]);
      }
    }
  }

 private:
  std::vector<PreparedBlock> blocks_;
  std::vector<std::vector<CachePlace>> places_; // of the last step
};

} // namespace

void bind_prepared_stack(nb::module_& m) {
  nb::class_<Ends>(m, "ModelEnds")
      .def(
          "__init__",
          [](Ends* self, const array& w, const array& scales, const array& biases, int group_size,
              int bits, const array& norm, float eps) {
            AffineWeight embedding{w, scales, biases, {.bits = bits, .group_size = group_size}};
            new (self)
                Ends{std::make_shared<ModelEnds>(embedding, norm, eps), {w, scales, biases, norm}};
          },
          "w"_a, "scales"_a, "biases"_a, "group_size"_a, "bits"_a, "norm"_a, "eps"_a)
      .def(
          "made_of",
          [](const Ends& ends, const std::vector<array>& arrays) {
            return same(arrays, ends.arrays);
          },
          "arrays"_a);
  nb::class_<PreparedStack>(m, "PreparedStack")
      .def(nb::init<const std::vector<PreparedStack::Given>&>(), "blocks"_a)
      .def("unchanged", &PreparedStack::unchanged)
      .def("step", &PreparedStack::step, "x"_a, "rows"_a, "masking"_a,
          "slots"_a = std::vector<int>{}, "ends"_a = Ends{}, nb::kw_only(), "stream"_a = nb::none())
      .def("advance", &PreparedStack::advance);
}

} // namespace optiq
