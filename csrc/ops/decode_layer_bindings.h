#pragma once

#include <nanobind/nanobind.h>

namespace optiq {

void bind_decode_layer(nanobind::module_& m);

} // namespace optiq
