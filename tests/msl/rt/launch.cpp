// One dispatch: buffers in, every threadgroup, buffers out; faults and the time limit.
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>
#include <ucontext.h>

#include "runtime.h"

static const int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGVTALRM};
constexpr u32 kSignalCount = sizeof kSignals / sizeof *kSignals;
static struct sigaction previous[kSignalCount];

static u64 program_counter(void* context) {
  return ((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP];
}

static void on_signal(int signal, siginfo_t* info, void* context) {
  if (signal == SIGVTALRM) {
    if (!pthread_equal(pthread_self(), engine.owner)) {
      pthread_kill(engine.owner, signal); // the timer may strike any thread of the process
    } else if (engine.armed && !engine.current) {
      engine.late = true;
    } else if (engine.armed) {
      fail(
          "the kernel ran for more than %u seconds and is now at <pc:%lx>; it last called the "
          "emulator at <pc:%lx>",
          engine.launch->seconds, program_counter(context) - (u64)&__ehdr_start + 1,
          module_offset(engine.last_call));
    }
    return;
  }
  if (!engine.armed || !pthread_equal(pthread_self(), engine.owner) || !engine.current) {
    for (u32 i = 0; i < kSignalCount; i++) { // not ours: it strikes again, with the old handler
      if (kSignals[i] == signal) {
        sigaction(signal, &previous[i], nullptr);
      }
    }
    return;
  }
  report_fault((u64)info->si_addr, program_counter(context), signal);
}

static void set_timer(u32 seconds) {
  struct itimerval timer = {};
  timer.it_value.tv_sec = seconds;
  setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

static double now() {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + 1e-9 * time.tv_nsec;
}

static void run_grid() {
  const Launch& launch = *engine.launch;
  u32 groups[3], at[3];
  for (u32 axis = 0; axis < 3; axis++) {
    groups[axis] = launch.flags & kGridIsThreads
                       ? (launch.grid[axis] + launch.threads[axis] - 1) / launch.threads[axis]
                       : launch.grid[axis];
  }
  engine.threadgroup_number = 0;
  for (at[2] = 0; at[2] < groups[2]; at[2]++) {
    for (at[1] = 0; at[1] < groups[1]; at[1]++) {
      for (at[0] = 0; at[0] < groups[0]; at[0]++) {
        run_threadgroup(at, groups);
        if (engine.late) {
          snprintf(engine.counters.error, sizeof engine.counters.error,
              "the kernel ran for more than %u seconds", launch.seconds);
        }
        if (engine.counters.error[0]) {
          return;
        }
        engine.threadgroup_number++;
      }
    }
  }
}

static u64 mixed(u64 x) { // splitmix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

// A chip sums in one order, whatever it sums.
static void choose_order(u8* order, u32 count) {
  for (u32 i = 0; i < count; i++) {
    order[i] = i;
  }
  for (u32 i = count - 1; engine.launch->chip && i > 0; i--) {
    const u32 other = mixed(engine.launch->chip * 64 + i) % (i + 1);
    const u8 kept = order[i];
    order[i] = order[other];
    order[other] = kept;
  }
}

// The value that a chip has for a function of x: the same for the same x, at most 2 ulp away. Exact
// where any implementation is: at zero, and for 0, 1, infinities and NaN as results.
MSL_ENTRY float __msl_near(float value, float x) {
  const float size = value < 0 ? -value : value;
  if (!engine.launch->chip || x == 0 || size == 1 || !(size > 1e-30f && size < 1e30f)) {
    return value;
  }
  u32 bits, input;
  memcpy(&bits, &value, sizeof bits);
  memcpy(&input, &x, sizeof input);
  bits += mixed(engine.launch->chip ^ (u64)bits << 32 ^ input) % 5 - 2;
  memcpy(&value, &bits, sizeof bits);
  return value;
}

// Returns 0, or 1 with the report in counters->error.
MSL_ENTRY int msl_launch(const Launch* launch, Counters* counters) {
  static u8 signal_stack[65536];
  engine.launch = launch;
  engine.owner = pthread_self();
  engine.random = launch->seed * 2 + 1;
  choose_order(engine.lanes, kLanes);
  choose_order(engine.inner, 8);
  memset(&engine.counters, 0, sizeof engine.counters);
  if (!prepare_stacks(launch->threads[0] * launch->threads[1] * launch->threads[2]) ||
      !place_buffers()) {
    snprintf(counters->error, sizeof counters->error, "out of memory for the buffers");
    return 1;
  }
  stack_t stack = {}, old_stack;
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &old_stack);
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER; // a handler that reports never returns
  for (u32 i = 0; i < kSignalCount; i++) {
    sigaction(kSignals[i], &action, &previous[i]);
  }
  set_timer(launch->seconds);
  const double start = now();
  engine.last_call = nullptr;
  engine.current = nullptr;
  engine.late = false;
  engine.armed = true;
  const u32 rounding = __builtin_ia32_stmxcsr();
  if (launch->flags & kFlush) { // denormals, as operands and as results
    __builtin_ia32_ldmxcsr(rounding | 0x8040);
  }
  run_grid();
  __builtin_ia32_ldmxcsr(rounding);
  engine.armed = false;
  engine.counters.seconds = now() - start;
  set_timer(0);
  for (u32 i = 0; i < kSignalCount; i++) {
    sigaction(kSignals[i], &previous[i], nullptr);
  }
  sigaltstack(&old_stack, nullptr);
  take_buffers_back();
  memcpy(counters, &engine.counters, sizeof *counters);
  return counters->error[0] != 0;
}
