#pragma once

#include <nanobind/nanobind.h>

#include "launch/plan.h"

namespace optiq::launch {

// Plans as dictionaries, so that tests and benchmarks run exactly what the GPU would.
void bind(nanobind::module_& m);

nanobind::dict to_python(const Plan& plan);

} // namespace optiq::launch
