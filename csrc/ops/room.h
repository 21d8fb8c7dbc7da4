// Room for what will be written later.
#pragma once

#include <mlx/array.h>
#include <mlx/utils.h>

namespace mx = mlx::core;

namespace optiq {

/** An array whose values are whatever was in its memory: nobody may read what nobody has written.
 * The system gives large ones page by page when they are written, so they cost nothing before.
 * On a GPU it is filled with zeros. */
mx::array room(const mx::Shape& shape, mx::Dtype dtype, mx::StreamOrDevice s = {});

} // namespace optiq
