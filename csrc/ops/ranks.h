// What ranks put together (cpu/ranks.h) as nodes of the graph. Those of one model have to be
// evaluated in the same order by all ranks: each should depend on the one before it.
#pragma once

#include <memory>

#include <nanobind/nanobind.h>

#include "cpu/ranks.h"

namespace optiq {

using RanksPtr = std::shared_ptr<const cpu::Ranks>;

/** What Python holds, for the same reason as a BlockHandle. */
struct RanksHandle {
  RanksPtr ranks;
};

void bind_ranks(nanobind::module_& m);

} // namespace optiq
