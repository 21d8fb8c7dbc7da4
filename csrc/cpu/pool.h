// A small pool that keeps all cores on one loop: static threads, dynamic chunks.
#pragma once

#include "types.h"

namespace optiq::cpu {

// Runs body(context, i) for i in [0, n) on all threads and returns when all are done.
// Calls from several threads are served one after the other; a nested call runs serially.
void parallel_for(int n, void (*body)(void*, int), void* context);

template <class F>
void parallel_for(int n, F& body) {
  parallel_for(n, [](void* f, int i) { (*static_cast<F*>(f))(i); }, &body);
}

// Work below this costs less than waking the other threads for it.
constexpr double kSerialFlops = 1 << 18;

constexpr size_t kSerialValues = 1 << 14; // the same of values that are only read or written

// row(r) for r in [0, rows), each of `width` values.
template <class Row>
void for_rows(size_t rows, size_t width, Row& row) {
  if (rows * width < kSerialValues) {
    for (size_t r = 0; r < rows; r++) {
      row(int(r));
    }
  } else {
    parallel_for(int(rows), row);
  }
}

// A loop is cut into more tasks than threads, so that a thread that is held up does not hold up
// all.
constexpr int kTasksPerThread = 4;

// OPTIQ_NUM_THREADS within reason, else the number of processors this process may run on.
OPTIQ_API int num_threads();

} // namespace optiq::cpu
