// The stand-in for MLX's Metal device, and a C interface to csrc/metal/encoder.cpp on top of it.
#include <array>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include <mlx/allocator.h>
#include <mlx/backend/metal/device.h>
#include <mlx/primitives.h>

#include "metal/encoder.h"
#include "ops/decode_layer.h"

namespace mlx::core::metal {

// The rules of MLX 0.32.4 (mlx/backend/metal/device.cpp), in its words.
void CommandEncoder::set_input_array(const array& a, int index, int64_t offset) {
  const void* buffer = a.buffer().ptr();
  next_inputs_.insert(buffer);
  needs_barrier_ = needs_barrier_ || prev_outputs_.count(buffer) > 0;
  allocator::Buffer memory = a.buffer();
  arguments_[index] = {
      a.data_shared_ptr(), buffer, memory.raw_ptr(), a.buffer_size(), size_t(a.offset() + offset), {}};
}

void CommandEncoder::set_output_array(array& a, int index, int64_t offset) {
  set_input_array(a, index, offset);
  const void* buffer = a.buffer().ptr();
  next_outputs_.insert(buffer);
  needs_barrier_ = needs_barrier_ || prev_inputs_.count(buffer) > 0;
}

void CommandEncoder::set_bytes(const void* bytes, int count, int index) {
  auto* first = static_cast<const uint8_t*>(bytes);
  arguments_[index] = {};
  arguments_[index].constants.assign(first, first + count);
}

void CommandEncoder::dispatch_threadgroups(MTL::Size threadgroups, MTL::Size threads) {
  dispatches.push_back({pipeline_, arguments_, threadgroups, threads, needs_barrier_});
  if (needs_barrier_) {
    needs_barrier_ = false;
    prev_inputs_.swap(next_inputs_);
    prev_outputs_.swap(next_outputs_);
  } else {
    prev_inputs_.insert(next_inputs_.begin(), next_inputs_.end());
    prev_outputs_.insert(next_outputs_.begin(), next_outputs_.end());
  }
  next_inputs_.clear();
  next_outputs_.clear();
}

MTL::Library* Device::get_library(
    const std::string& name, const std::function<std::string(void)>& builder) {
  asked++;
  if (fails == "library") {
    throw std::runtime_error("[metal::Device] Unable to build metal library from source");
  }
  auto& library = libraries[name];
  if (!library) {
    library.reset(new MTL::Library{name, builder()});
  }
  return library.get();
}

MTL::ComputePipelineState* Device::get_kernel(const std::string& name, MTL::Library* library) {
  if (fails == "function") {
    throw std::runtime_error("[metal::Device] Unable to load function " + name);
  }
  if (fails == "pipeline") {
    throw std::runtime_error("[metal::Device] Unable to load kernel " + name);
  }
  for (auto& known : pipelines) {
    if (known->library == library && known->kernel == name) {
      return known.get();
    }
  }
  pipelines.emplace_back(new MTL::ComputePipelineState{library, name, allowed});
  return pipelines.back().get();
}

static std::unique_ptr<Device> the_device;
static std::unique_ptr<CommandEncoder> the_encoder;

Device& device(mlx::core::Device) {
  return *the_device;
}
CommandEncoder& get_command_encoder(Stream) {
  return *the_encoder;
}

} // namespace mlx::core::metal

namespace {

namespace mx = mlx::core;
using namespace optiq::launch;

std::vector<std::unique_ptr<mx::array>> arrays; // held by the caller, as a graph would
Plan plan;
std::shared_ptr<optiq::LaunchedLayer> layer;
std::string error;

const mx::metal::Dispatch& dispatch(int i) {
  return mx::metal::the_encoder->dispatches.at(i);
}
Size size(const uint32_t* s) {
  return {s[0], s[1], s[2]};
}

} // namespace

#define API extern "C" __attribute__((visibility("default")))

API void rec_start(const char* fails, size_t allowed) {
  arrays.clear();
  mx::metal::the_encoder = std::make_unique<mx::metal::CommandEncoder>();
  mx::metal::the_device = std::make_unique<mx::metal::Device>();
  mx::metal::the_device->fails = fails;
  mx::metal::the_device->allowed = allowed;
}

// An array without contents, or one whose buffer begins with these bytes.
API int rec_array(const int* shape, int axes, int itemsize, const void* bytes, size_t count,
    const int64_t* strides, size_t offset) {
  mx::Shape dims(shape, shape + axes);
  mx::Dtype type = itemsize == 1 ? mx::uint8 : itemsize == 2 ? mx::uint16 : mx::uint32;
  auto a = std::make_unique<mx::array>(dims, type, nullptr, std::vector<mx::array>{});
  if (bytes) {
    auto data = mx::allocator::malloc(count);
    mx::allocator::Buffer buffer = data.buffer();
    std::memcpy(buffer.raw_ptr(), bytes, count);
    mx::Strides own(strides, strides + axes);
    bool row_contiguous = true;
    int64_t expected = 1;
    for (int axis = axes - 1; axis >= 0; axis--) {
      row_contiguous = row_contiguous && (dims[axis] == 1 || own[axis] == expected);
      expected *= dims[axis];
    }
    a->set_data(std::move(data), a->size(), own, {row_contiguous, row_contiguous, false}, offset);
  }
  arrays.push_back(std::move(a));
  return int(arrays.size()) - 1;
}

API void rec_plan() {
  plan = {};
}
API void rec_temporary(size_t bytes) {
  plan.temporaries.push_back(bytes);
}
API void rec_strided(int input) {
  plan.strided.push_back(input);
}
API void rec_launch(const char* source, const char* kernel, const char* instantiation,
    const uint32_t* threadgroups, const uint32_t* threads) {
  plan.launches.push_back({source, kernel, instantiation, {}, size(threadgroups), size(threads)});
}
API void rec_argument(int kind, int index, const uint8_t* bytes, size_t count) {
  plan.launches.back().arguments.push_back(
      {Argument::Kind(kind), index, std::vector<uint8_t>(bytes, bytes + count)});
}

// Encodes the plan; what it raises, or nothing.
API const char* rec_run(const int* inputs, int input_count, const int* outputs, int output_count) {
  std::vector<mx::array> in, out;
  for (int i = 0; i < input_count; i++) {
    in.push_back(*arrays.at(inputs[i]));
  }
  for (int i = 0; i < output_count; i++) {
    out.push_back(*arrays.at(outputs[i]));
  }
  error.clear();
  try {
    optiq::metal::run(plan, in, out, mx::Stream(0, mx::Device(mx::Device::gpu)));
  } catch (const std::exception& raised) {
    error = raised.what();
  }
  return error.c_str();
}

// A layer of three projections before attention, without norms of heads and of results, that rotates
// half of each head: width, heads, key heads, dim, hidden, group size, bits; and its arrays, in
// float16.
API void rec_layer(const int* numbers, const int* which, int count) {
  auto [width, heads, kv_heads, dim, hidden, group_size, bits] = std::to_array<const int, 7>(
      {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6]});
  layer = std::make_shared<optiq::LaunchedLayer>();
  layer->dtype = mx::uint16; // as rec_array calls items of two bytes
  DecodeLayer& op = layer->described;
  auto weight = [=](int out) {
    return QuantizedWeight{out, {.bits = bits, .group_size = group_size}, Float::f16};
  };
  op.width = width;
  op.attention.heads = heads;
  op.attention.kv_heads = kv_heads;
  op.attention.type = Float::f16;
  op.attention.k = op.attention.v = {dim, {}, {}};
  op.attention.scale = 1 / std::sqrt(float(dim));
  op.qkv = {weight(heads * dim), weight(kv_heads * dim), weight(kv_heads * dim)};
  op.out = op.down = weight(width);
  op.gate_up = {weight(hidden), weight(hidden)};
  op.rope.dims = dim / 2;
  op.eps_in = op.eps_mlp = 1e-5f;
  for (int i = 0; i < count; i++) {
    layer->arrays.push_back(*arrays.at(which[i]));
  }
}

// One token, evaluated as MLX does it; the numbers of h and the caches after it. The caches are no
// longer held by the caller, unless `held`.
API const char* rec_token(int h, int* caches, const int* place, bool held, int* out) {
  error.clear();
  try {
    auto outputs = optiq::decode_layer(layer, *arrays.at(h), *arrays.at(caches[0]),
        *arrays.at(caches[1]), {place[0], place[1], place[2]}, mx::Stream(0, mx::Device::gpu));
    for (int i = 0; i < 2 && !held; i++) {
      arrays.at(caches[i]).reset();
    }
    auto given = outputs[0].outputs();
    outputs[0].primitive().eval_gpu(outputs[0].inputs(), given);
    outputs[0].detach();
    for (int i = 0; i < 3; i++) {
      outputs[i].set_status(mx::array::Status::available);
      arrays.push_back(std::make_unique<mx::array>(outputs[i]));
      out[i] = int(arrays.size()) - 1;
    }
  } catch (const std::exception& raised) {
    error = raised.what();
  }
  return error.c_str();
}

// How often the device was asked for a library; where an array's buffer lies.
API int rec_asked() {
  return mx::metal::the_device->asked;
}
API uint64_t rec_memory(int array) {
  mx::allocator::Buffer buffer = arrays.at(array)->buffer();
  return uint64_t(buffer.raw_ptr());
}

API int rec_dispatches() {
  return int(mx::metal::the_encoder->dispatches.size());
}
API int rec_temporaries() {
  return int(mx::metal::the_encoder->temporaries.size());
}
API const char* rec_library(int i) {
  return dispatch(i).pipeline->library->text.c_str();
}
API const char* rec_kernel(int i) {
  return dispatch(i).pipeline->kernel.c_str();
}
// after_barrier, threadgroups, threads
API void rec_sizes(int i, uint64_t* out) {
  const auto& d = dispatch(i);
  const uint64_t all[] = {d.after_barrier, d.threadgroups.width, d.threadgroups.height,
      d.threadgroups.depth, d.threads.width, d.threads.height, d.threads.depth};
  std::memcpy(out, all, sizeof all);
}
// 0: nothing is bound, 1: an array, 2: constants, 3: an array whose memory nobody keeps any more.
API int rec_bound(int i, int index, void** memory, uint64_t* bytes, uint64_t* offset) {
  auto found = dispatch(i).arguments.find(index);
  if (found == dispatch(i).arguments.end()) {
    return 0;
  }
  const auto& bound = found->second;
  *memory = bound.buffer ? bound.memory : (void*)bound.constants.data();
  *bytes = bound.buffer ? bound.bytes : bound.constants.size();
  *offset = bound.offset;
  return !bound.buffer ? 2 : bound.owner.expired() ? 3 : 1;
}
API void rec_contents(int array, void* out) {
  mx::allocator::Buffer buffer = arrays.at(array)->buffer();
  std::memcpy(out, (uint8_t*)buffer.raw_ptr() + arrays.at(array)->offset(), arrays.at(array)->nbytes());
}
