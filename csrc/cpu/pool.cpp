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

// Products follow each other within microseconds: a spin of some 40 us keeps the workers awake
// between them, then they sleep in the kernel, from where waking takes as long again.
constexpr int kSpins = 3000;

// More threads than this only wait for each other; the limit keeps a typing error harmless.
constexpr int kMostThreadsPerProcessor = 4;

// In place of the next task: none may be taken.
constexpr uint32_t kClosed = 0xffffffff;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A job is over when its tasks are done, whether or not every worker has woken up for it: on a busy
// machine that can take a worker milliseconds, in which the caller does the work itself.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; i++) {
      workers_.emplace_back([this] { work(); });
    }
  }

  void run(int n, void (*body)(void*, int), void* context) {
    std::lock_guard lock(one_job_);
    uint32_t job = job_.load() + 1;
    next_.store(uint64_t(job) << 32 | kClosed); // before anything of the job can be seen
    body_.store(body, std::memory_order_release);
    context_.store(context, std::memory_order_release);
    n_.store(n, std::memory_order_release);
    done_.store(0, std::memory_order_release);
    next_.store(uint64_t(job) << 32);
    job_.store(job);
    job_.notify_all();
    drain(job);
    for (int spins = 0; done_.load() != n; spins++) {
      spins < kSpins ? pause() : std::this_thread::yield();
    }
  }

 private:
  // Takes tasks of this job while there are any. A task can only be taken while `next_` carries the
  // job's number and is open, and between those two moments nothing that is read here changes:
  // whoever gets a task has read the body, the context and the count that belong to it.
  void drain(uint32_t job) {
    inside = true;
    auto body = body_.load(std::memory_order_acquire);
    auto context = context_.load(std::memory_order_acquire);
    uint32_t n = n_.load(std::memory_order_acquire);
    uint64_t next = next_.load();
    while (next >> 32 == job && uint32_t(next) < n) {
      if (next_.compare_exchange_weak(next, next + 1)) {
        body(context, int(uint32_t(next)));
        done_.fetch_add(1);
        next = next_.load();
      }
    }
    inside = false;
  }

  void work() {
    uint32_t seen = 0;
    while (true) {
      for (int spins = 0; job_.load() == seen && spins < kSpins; spins++) {
        pause();
      }
      job_.wait(seen);
      seen = job_.load();
      drain(seen);
    }
  }

 public:
  static thread_local bool inside;

 private:
  std::vector<std::thread> workers_;
  std::mutex one_job_;
  std::atomic<uint32_t> job_{0};
  std::atomic<uint64_t> next_{0}; // the job in the high half, its next task in the low one
  std::atomic<int> done_{0};
  std::atomic<void (*)(void*, int)> body_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<uint32_t> n_{0};
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
