#pragma once

#include <nanobind/nanobind.h>

namespace optiq {

void bind_decoder_block(nanobind::module_& m);

} // namespace optiq
