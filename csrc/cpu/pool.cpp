#include "pool.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include <pthread.h>

#ifdef __linux__
#include <sched.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace optiq::cpu {
namespace {

// Matmuls of one layer follow each other within microseconds: a short spin (about 10 us) keeps
// the workers awake between them, then they sleep in the kernel. Spinning longer would take the
// core from the thread that builds the next graph.
constexpr int kSpins = 300;

// More threads than this only wait for each other; the limit keeps a typing error harmless.
constexpr int kMostThreadsPerProcessor = 4;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; i++) {
      workers_.emplace_back([this] { work(); });
    }
  }

  void run(int n, void (*body)(void*, int), void* context) {
    std::lock_guard lock(one_job_);
    body_ = body;
    context_ = context;
    n_ = n;
    next_.store(0);
    busy_.store(int(workers_.size()));
    generation_.fetch_add(1);
    generation_.notify_all();
    drain();
    for (int spins = 0; busy_.load() != 0; spins++) {
      spins < kSpins ? pause() : std::this_thread::yield();
    }
  }

 private:
  void drain() {
    inside = true;
    for (int i = next_.fetch_add(1); i < n_; i = next_.fetch_add(1)) {
      body_(context_, i);
    }
    inside = false;
  }

  void work() {
    uint32_t seen = 0;
    while (true) {
      for (int spins = 0; generation_.load() == seen && spins < kSpins; spins++) {
        pause();
      }
      generation_.wait(seen);
      seen = generation_.load();
      drain();
      busy_.fetch_sub(1);
    }
  }

 public:
  static thread_local bool inside;

 private:
  std::vector<std::thread> workers_;
  std::mutex one_job_;
  std::atomic<uint32_t> generation_{0};
  std::atomic<int> next_{0};
  std::atomic<int> busy_{0};
  void (*body_)(void*, int) = nullptr;
  void* context_ = nullptr;
  int n_ = 0;
};

thread_local bool Pool::inside = false;

int processors() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    return CPU_COUNT(&set);
  }
#endif
  return std::max(1, int(std::thread::hardware_concurrency()));
}

int available_threads() {
  int most = processors();
  const char* asked = std::getenv("OPTIQ_NUM_THREADS");
  int n = asked ? std::atoi(asked) : most;
  return n > 0 ? std::min(n, kMostThreadsPerProcessor * most) : most;
}

std::atomic<Pool*> pool{nullptr};
std::mutex making;

// Never destroyed: at process exit the workers may outlive static destructors of other
// libraries, and joining there can deadlock.
Pool& current_pool() {
  if (Pool* made = pool.load()) {
    return *made;
  }
  std::lock_guard lock(making);
  if (!pool.load()) {
    // A forked child has none of the workers: it makes its own.
    [[maybe_unused]] static const int registered =
        pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
    pool.store(new Pool(num_threads()));
  }
  return *pool.load();
}

} // namespace

int num_threads() {
  static const int n = available_threads();
  return n;
}

void parallel_for(int n, void (*body)(void*, int), void* context) {
  if (n <= 0) {
    return;
  }
  if (n == 1 || num_threads() == 1 || Pool::inside) {
    for (int i = 0; i < n; i++) {
      body(context, i);
    }
    return;
  }
  current_pool().run(n, body, context);
}

} // namespace optiq::cpu
