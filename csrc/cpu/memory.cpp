#include "memory.h"

#include <bit>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

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

// Memory that is too large to be kept comes from the system in large pages: it takes a few faults,
// and none of it stays with the allocator, which would keep smaller blocks of others as well.
void* take_large(size_t bytes) {
#ifdef __linux__
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    throw std::bad_alloc();
  }
  madvise(memory, bytes, MADV_HUGEPAGE);
  return memory;
#else
  return ::operator new(bytes, kLine);
#endif
}

void give_large(void* memory, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
  munmap(memory, bytes);
#else
  ::operator delete(memory, kLine);
#endif
}

} // namespace

void* take_memory(size_t bytes) {
  int size = size_class(bytes);
  if (size > kLargest) {
    return take_large(bytes);
  }
  if (Store::over) {
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
  if (size > kLargest) {
    return give_large(memory, bytes);
  }
  if (Store::over || store.free[size].size() >= kKept) {
    return ::operator delete(memory, kLine);
  }
  store.free[size].push_back(memory);
}

} // namespace optiq::cpu
