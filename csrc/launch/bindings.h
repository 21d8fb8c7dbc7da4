#pragma once

#include <nanobind/nanobind.h>

namespace optiq::launch {

// Plans as dictionaries, so that tests and benchmarks run exactly what the GPU would.
void bind(nanobind::module_& m);

} // namespace optiq::launch
