// Memory that is taken and given back many times a token. Each thread keeps what it gave back, as
// the allocator would return pages to the system after a block, and each block fault them in again.
#pragma once

#include <cstddef>

#include "types.h"

namespace optiq::cpu {

/** At least so many bytes, aligned to a cache line, not initialised. */
OPTIQ_API void* take_memory(size_t bytes);
/** Gives back what take_memory() gave for as many bytes. */
OPTIQ_API void give_memory(void* memory, size_t bytes);

/** An array of uninitialised values. */
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t n) : bytes_(n * sizeof(T)), data_(static_cast<T*>(take_memory(bytes_))) {}
  ~Buffer() {
    give_memory(data_, bytes_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const {
    return data_;
  }

 private:
  size_t bytes_;
  T* data_;
};

} // namespace optiq::cpu
