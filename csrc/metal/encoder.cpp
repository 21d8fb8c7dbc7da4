// The part under _METAL_ decides nothing: kernels, arguments, grids and constants come from the
// plan. Off a Mac it runs against a stand-in for MLX's device (tests/encoder).
#include "metal/encoder.h"

#include <limits>
#include <stdexcept>

#include "metal/source.h"

namespace optiq::metal {

std::string library_source(const launch::Launch& launch) {
  return std::string(source(launch.source)) + "\ntemplate [[host_name(\"" + launch.kernel +
         "\")]] [[kernel]] decltype(" + launch.instantiation + ") " + launch.instantiation + ";\n";
}

std::string library_name(const launch::Launch& launch) {
  return "optiq_" + std::string(source_hash(launch.source)) + "_" + launch.kernel;
}

void require_threads(const launch::Launch& launch, size_t allowed) {
  size_t asked = size_t(launch.threads.x) * launch.threads.y * launch.threads.z;
  if (asked > allowed) { // registers decide, so only the compiled kernel knows
    throw std::runtime_error("[optiq] " + launch.kernel + " asks for " + std::to_string(asked) +
                             " threads in a threadgroup, but this GPU allows it " +
                             std::to_string(allowed) + "; see OPTIQ_TUNE in docs/kernels.md");
  }
}

int array_size(size_t bytes) {
  if (bytes > size_t(std::numeric_limits<int>::max())) {
    throw std::runtime_error("[optiq] a kernel asks for a temporary of " + std::to_string(bytes) +
                             " bytes, but an array of MLX has less than 2^31; use smaller batches");
  }
  return int(bytes);
}

namespace {

bool dense(const mx::array& a) {
  return a.ndim() > 0 && a.strides().back() == 1;
}

} // namespace

std::vector<int64_t> strides_handed_on(const mx::array& a) {
  std::vector<int64_t> strides(a.strides().begin(), a.strides().end());
  int64_t stride = 1;
  for (int axis = int(a.ndim()) - 1; axis >= 0 && !dense(a); axis--) {
    strides[axis] = stride;
    stride *= a.shape(axis);
  }
  return strides;
}

} // namespace optiq::metal

#ifdef _METAL_

#include <algorithm>

#include <mlx/allocator.h>
#include <mlx/backend/metal/device.h>

#include "launch/copy.h"

namespace optiq::metal {

namespace {

MTL::ComputePipelineState* pipeline(mx::metal::Device& device, const launch::Launch& launch) {
  auto* library = device.get_library(library_name(launch), [&] { return library_source(launch); });
  auto* kernel = device.get_kernel(launch.kernel, library);
  require_threads(launch, kernel->maxTotalThreadsPerThreadgroup());
  return kernel;
}

MTL::Size size(const launch::Size& s) {
  return MTL::Size(s.x, s.y, s.z);
}

// All of them before anything is encoded: a failure leaves no half a plan. MLX keeps them.
Compiled compile(const launch::Plan& plan, mx::Stream stream) {
  auto& device = mx::metal::device(stream.device);
  Compiled all;
  for (const auto& launch : plan.launches) {
    all.push_back(pipeline(device, launch));
  }
  return all;
}

void encode(const launch::Plan& plan, const Compiled& compiled,
    const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, mx::Stream stream) {
  auto& encoder = mx::metal::get_command_encoder(stream);
  std::vector<mx::array> temporaries;
  for (size_t bytes : plan.temporaries) {
    mx::array temporary({array_size(bytes)}, mx::uint8, nullptr, {});
    temporary.set_data(mx::allocator::malloc(bytes));
    encoder.add_temporary(temporary); // lives until the GPU is done
    temporaries.push_back(temporary);
  }
  for (size_t l = 0; l < plan.launches.size(); l++) {
    const auto& launch = plan.launches[l];
    encoder.set_compute_pipeline_state(static_cast<MTL::ComputePipelineState*>(compiled[l]));
    for (size_t i = 0; i < launch.arguments.size(); i++) {
      const auto& argument = launch.arguments[i];
      switch (argument.kind) {
        case launch::Argument::Kind::input:
          encoder.set_input_array(inputs[argument.index], int(i));
          break;
        case launch::Argument::Kind::output:
          encoder.set_output_array(outputs[argument.index], int(i));
          break;
        case launch::Argument::Kind::temporary:
          // Written or read: as an output it is ordered after every earlier use.
          encoder.set_output_array(temporaries[argument.index], int(i));
          break;
        case launch::Argument::Kind::constants:
          encoder.set_bytes(argument.bytes.data(), int(argument.bytes.size()), int(i));
          break;
      }
    }
    encoder.dispatch_threadgroups(size(launch.threadgroups), size(launch.threads));
  }
}

void copy_rows(const mx::array& a, mx::array& to, mx::Stream stream) {
  std::vector<mx::array> copy = {to};
  copy[0].set_data(mx::allocator::malloc(copy[0].nbytes()));
  std::vector<int> shape(a.shape().begin(), a.shape().end());
  std::vector<int64_t> strides(a.strides().begin(), a.strides().end());
  size_t itemsize = a.itemsize();
  if (a.flags().row_contiguous) { // of one axis, and as few items as can be
    itemsize = a.nbytes() % 8 == 0 ? 8 : itemsize;
    shape = {int(a.nbytes() / itemsize)};
    strides = {1};
  }
  auto plan = launch::plan_row_contiguous(shape, strides, itemsize);
  encode(plan, compile(plan, stream), {a}, copy, stream);
}

mx::array row_contiguous(const mx::array& a, mx::Stream stream) {
  if (a.flags().row_contiguous) {
    return a;
  }
  mx::array copy(a.shape(), a.dtype(), nullptr, {});
  copy_rows(a, copy, stream);
  mx::metal::get_command_encoder(stream).add_temporary(copy);
  return copy;
}

} // namespace

const launch::Tuning& tuning(mx::Stream stream) {
  static const launch::Tuning all = // one GPU on every Mac
      launch::tuning(launch::parse_gpu(mx::metal::device(stream.device).get_architecture()));
  return all;
}

void run(const launch::Plan& plan, const std::vector<mx::array>& inputs,
    const std::vector<mx::array>& outputs, mx::Stream stream) {
  Compiled compiled;
  run_again(plan, inputs, outputs, stream, compiled);
}

void run_again(const launch::Plan& plan, const std::vector<mx::array>& inputs,
    const std::vector<mx::array>& outputs, mx::Stream stream, Compiled& compiled) {
  if (compiled.empty()) {
    compiled = compile(plan, stream);
  }
  std::vector<mx::array> in, out = outputs; // handles: they share what set_data sets
  for (int i = 0; i < int(inputs.size()); i++) {
    bool strided = std::count(plan.strided.begin(), plan.strided.end(), i) > 0;
    in.push_back(strided && dense(inputs[i]) ? inputs[i] : row_contiguous(inputs[i], stream));
  }
  for (auto& a : out) {
    if (!a.data_shared_ptr()) {
      a.set_data(mx::allocator::malloc(a.nbytes()));
    }
  }
  encode(plan, compiled, in, out, stream);
}

void share_or_copy(const mx::array& in, mx::array& out, mx::Stream stream) {
  if (in.is_donatable() && in.flags().row_contiguous) {
    out.copy_shared_buffer(in);
  } else {
    copy_rows(in, out, stream);
  }
}

} // namespace optiq::metal

#else

namespace optiq::metal {

const launch::Tuning& tuning(mx::Stream) {
  throw std::runtime_error(
      "[optiq] built without Metal; use the CPU: mx.set_default_device(mx.cpu)");
}

void run(const launch::Plan&, const std::vector<mx::array>&, const std::vector<mx::array>&,
    mx::Stream stream) {
  tuning(stream);
}

void run_again(const launch::Plan&, const std::vector<mx::array>&, const std::vector<mx::array>&,
    mx::Stream stream, Compiled&) {
  tuning(stream);
}

void share_or_copy(const mx::array&, mx::array&, mx::Stream stream) {
  tuning(stream);
}

} // namespace optiq::metal

#endif
