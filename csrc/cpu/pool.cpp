#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
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

// Products follow each other within microseconds, and tokens within a millisecond: workers spin for
// so long, then they sleep in the kernel. Waking takes 40 us from there, and milliseconds where the
// machine is virtual and lets its processor go.
constexpr auto kAwake = std::chrono::microseconds(1500);
constexpr int kSpins = 500; // between two looks at the clock, some microseconds

// The caller waits for tasks that others have begun, and gives way to them early.
constexpr int kSpinsOfCaller = 3000;

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

// Each thread takes the tasks of its own share in turn, so that it reads memory in order, and then
// what is left of the others' shares. A job is over when its tasks are done, whether or not every
// worker has woken up for it: on a busy machine that can take a worker milliseconds, in which the
// others do the work themselves.
class Pool {
 public:
  explicit Pool(int threads) : shares_(threads) {
    for (int i = 1; i < threads; i++) {
      workers_.emplace_back([this, i] { work(i); });
    }
  }

  void run(int n, void (*body)(void*, int), void* context) {
    std::lock_guard lock(one_job_);
    uint32_t job = job_.load() + 1;
    for (Share& share : shares_) { // before anything of the job can be seen
      share.next.store(uint64_t(job) << 32 | kClosed);
    }
    body_.store(body, std::memory_order_release);
    context_.store(context, std::memory_order_release);
    n_.store(n, std::memory_order_release);
    done_.store(0, std::memory_order_release);
    for (size_t i = 0; i < shares_.size(); i++) {
      shares_[i].next.store(uint64_t(job) << 32 | begin(n, i));
    }
    job_.store(job);
    job_.notify_all();
    drain(job, 0);
    for (int spins = 0; done_.load() != n; spins++) {
      spins < kSpinsOfCaller ? pause() : std::this_thread::yield();
    }
  }

 private:
  struct alignas(64) Share {
    std::atomic<uint64_t> next{0}; // the job in the high half, its next task in the low one
  };

  uint32_t begin(uint32_t n, size_t share) const {
    return uint32_t(uint64_t(n) * share / shares_.size());
  }

  // Takes tasks of this job while there are any. A task can only be taken while `next` carries the
  // job's number and is open, and between those two moments nothing that is read here changes:
  // whoever gets a task has read the body, the context and the count that belong to it.
  void drain(uint32_t job, size_t own) {
    inside = true;
    auto body = body_.load(std::memory_order_acquire);
    auto context = context_.load(std::memory_order_acquire);
    uint32_t n = n_.load(std::memory_order_acquire);
    for (size_t i = 0; i < shares_.size(); i++) {
      size_t share = (own + i) % shares_.size();
      uint32_t end = begin(n, share + 1);
      auto& next = shares_[share].next;
      uint64_t task = next.load();
      while (task >> 32 == job && uint32_t(task) < end) {
        if (next.compare_exchange_weak(task, task + 1)) {
          body(context, int(uint32_t(task)));
          done_.fetch_add(1);
          task = next.load();
        }
      }
    }
    inside = false;
  }

  void work(size_t own) {
    uint32_t seen = 0;
    while (true) {
      auto until = std::chrono::steady_clock::now() + kAwake;
      while (job_.load() == seen && std::chrono::steady_clock::now() < until) {
        for (int spins = 0; job_.load() == seen && spins < kSpins; spins++) {
          pause();
        }
      }
      job_.wait(seen);
      seen = job_.load();
      drain(seen, own);
    }
  }

 public:
  static thread_local bool inside;

 private:
  std::vector<Share> shares_; // one for each thread
  std::vector<std::thread> workers_;
  std::mutex one_job_;
  alignas(64) std::atomic<uint32_t> job_{0};
  std::atomic<void (*)(void*, int)> body_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<uint32_t> n_{0};
  alignas(64) std::atomic<int> done_{0};
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
