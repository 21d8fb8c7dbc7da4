// In place of MLX's header of this name: what csrc/metal/encoder.cpp uses of it, on Linux. It notes
// every command, and keeps MLX's rules (0.32.4): which dispatches a barrier lies between, and what
// lives until the GPU is done. tests/encoder/recorder.py carries the commands out.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include <mlx/array.h>
#include <mlx/device.h>

namespace MTL {

struct Size {
  Size(size_t width, size_t height, size_t depth) : width(width), height(height), depth(depth) {}
  size_t width, height, depth;
};

struct Library {
  std::string name, text;
};

struct ComputePipelineState {
  Library* library;
  std::string kernel;
  size_t allowed;
  size_t maxTotalThreadsPerThreadgroup() const {
    return allowed;
  }
};

} // namespace MTL

namespace mlx::core::metal {

// Where an array lies: at an offset of a buffer. It does not keep the buffer.
struct Bound {
  std::weak_ptr<array::Data> owner;
  const void* buffer = nullptr;
  void* memory = nullptr;
  size_t bytes = 0, offset = 0;
  std::vector<uint8_t> constants; // instead
};

struct Dispatch {
  MTL::ComputePipelineState* pipeline;
  std::unordered_map<int, Bound> arguments;
  MTL::Size threadgroups, threads;
  bool after_barrier; // all dispatches before it are done, and seen
};

class CommandEncoder {
 public:
  void set_compute_pipeline_state(MTL::ComputePipelineState* pipeline) {
    pipeline_ = pipeline;
  }
  void set_input_array(const array& a, int index, int64_t offset = 0);
  void set_output_array(array& a, int index, int64_t offset = 0);
  void set_bytes(const void* bytes, int count, int index);
  void add_temporary(array a) {
    temporaries.push_back(std::move(a));
  }
  void dispatch_threadgroups(MTL::Size threadgroups, MTL::Size threads);

  std::vector<Dispatch> dispatches;
  std::vector<array> temporaries;

 private:
  MTL::ComputePipelineState* pipeline_ = nullptr;
  std::unordered_map<int, Bound> arguments_; // stay bound from one dispatch to the next
  bool needs_barrier_ = false;
  std::unordered_set<const void*> prev_inputs_, prev_outputs_, next_inputs_, next_outputs_;
};

class Device {
 public:
  const std::string& get_architecture() const {
    return architecture;
  }
  MTL::Library* get_library(
      const std::string& name, const std::function<std::string(void)>& builder);
  MTL::ComputePipelineState* get_kernel(const std::string& name, MTL::Library* library);

  std::string architecture = "applegpu_g15s";
  std::string fails; // the stage that raises: library, function, pipeline
  size_t allowed = 1024;
  int asked = 0; // for a library
  std::unordered_map<std::string, std::unique_ptr<MTL::Library>> libraries;
  std::vector<std::unique_ptr<MTL::ComputePipelineState>> pipelines;
};

Device& device(mlx::core::Device);
CommandEncoder& get_command_encoder(Stream);

} // namespace mlx::core::metal
