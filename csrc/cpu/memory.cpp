#include "memory.h"

#include <bit>
#include <new>
#include <vector>

namespace optiq::cpu {
namespace {

constexpr std::align_val_t kLine{64};
constexpr int kLargest = 22; // log2 of the bytes that are kept
constexpr size_t kKept = 4;  // of each size

// The next power of two, at least a cache line.
int size_class(size_t bytes) {
  return std::bit_width((bytes < 64 ? 64 : bytes) - 1);
}

struct Store {
  std::vector<void*> free[kLargest + 1];

  ~Store() {
    for (auto& each : free) {
      for (void* memory : each) {
        ::operator delete(memory, kLine);
      }
    }
    over = true;
  }

  static thread_local bool over; // whoever gives back after that is a thread's last destructor
};

thread_local bool Store::over = false;
thread_local Store store;

} // namespace

void* take_memory(size_t bytes) {
  int size = size_class(bytes);
  if (size > kLargest || Store::over) {
    return ::operator new(bytes, kLine);
  }
  auto& free = store.free[size];
  if (free.empty()) {
    return ::operator new(size_t(1) << size, kLine);
  }
  void* memory = free.back();
  free.pop_back();
  return memory;
}

void give_memory(void* memory, size_t bytes) {
  int size = size_class(bytes);
  if (size > kLargest || Store::over || store.free[size].size() >= kKept) {
    return ::operator delete(memory, kLine);
  }
  store.free[size].push_back(memory);
}

} // namespace optiq::cpu
