#pragma once

#include <algorithm>
#include <vector>

#include <nanobind/nanobind.h>

#include "ops/decoder_block.h"

namespace optiq {

// Whether these are the same arrays, not equal ones.
inline bool same(const std::vector<array>& a, const std::vector<array>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
      [](const array& x, const array& y) { return x.id() == y.id(); });
}

// What Python holds. A scheduled step keeps the block itself: were it the Python object, whoever
// drops it last would need the interpreter's lock, which the thread that waits for it may hold.
struct BlockHandle {
  BlockPtr block;
  std::vector<array> watched;

  // Remembers the arrays among the children, which may be changed in place.
  void watch(const nanobind::tuple& children) {
    watched.clear();
    for (nanobind::handle child : children) {
      if (nanobind::isinstance<array>(child)) {
        watched.push_back(*nanobind::inst_ptr<array>(child));
      }
    }
  }

  // Whether parents[i][keys[i]] is children[i] for all i, and their arrays are what they were. The
  // tuples stay Python's, which can tell that the modules in them refer to each other.
  bool unchanged(const nanobind::tuple& parents, const nanobind::tuple& keys,
      const nanobind::tuple& children) const {
    auto next = watched.begin();
    for (size_t i = 0; i < children.size(); i++) {
      PyObject* child = nanobind::handle(children[i]).ptr();
      if (PyDict_GetItem(nanobind::handle(parents[i]).ptr(), nanobind::handle(keys[i]).ptr()) !=
          child) {
        return false;
      }
      if (nanobind::isinstance<array>(child) &&
          (next == watched.end() || nanobind::inst_ptr<array>(child)->id() != (next++)->id())) {
        return false;
      }
    }
    return true;
  }
};

void bind_decoder_block(nanobind::module_& m);
void bind_prepared_stack(nanobind::module_& m);

} // namespace optiq
