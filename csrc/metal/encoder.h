// Carries out launch plans on a GPU, through MLX's Metal device.
#pragma once

#include <string>
#include <vector>

#include <mlx/array.h>
#include <mlx/stream.h>

#include "launch/plan.h"
#include "launch/tuning.h"

namespace optiq::metal {

namespace mx = mlx::core;

// What Metal compiles for a launch: the flattened file and the instantiation of one kernel.
std::string library_source(const launch::Launch& launch);

// MLX compiles a library once and keeps it by name for the process, hence the hash of the text.
std::string library_name(const launch::Launch& launch);

// Throws std::runtime_error where a compiled kernel takes fewer threads than the launch has.
void require_threads(const launch::Launch& launch, size_t allowed);

// Bytes of a temporary as the size of an array; throws std::runtime_error from 2^31 on.
int array_size(size_t bytes);

// Tile choices for the GPU of the stream, with OPTIQ_TUNE's changes.
const launch::Tuning& tuning(mx::Stream stream);

// Strides of an input that a plan names in `strided`, as run() hands it on: its own, unless its
// last axis is not dense and it is copied.
std::vector<int64_t> strides_handed_on(const mx::array& a);

// Allocates the outputs that have no memory yet and encodes the plan. Inputs that are not row-major
// are copied first. Throws std::runtime_error where optiq is built without Metal.
void run(const launch::Plan& plan, const std::vector<mx::array>& inputs,
    const std::vector<mx::array>& outputs, mx::Stream stream);

// The kernels of a plan's launches, for who runs it again: empty until they are compiled.
using Compiled = std::vector<void*>;

// The same, without looking the kernels up again.
void run_again(const launch::Plan& plan, const std::vector<mx::array>& inputs,
    const std::vector<mx::array>& outputs, mx::Stream stream, Compiled& compiled);

// Gives `out` the memory of `in` if nobody else holds it, else a row-major copy.
void share_or_copy(const mx::array& in, mx::array& out, mx::Stream stream);

} // namespace optiq::metal
