// Which fiber runs next; the start and the end of a threadgroup.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime.h"

Engine engine;

static const char* const kNames[kOperations] = {"nothing", "a simdgroup sum", "a simdgroup product",
    "a simdgroup minimum", "a simdgroup maximum", "simd_and", "simd_or", "simd_xor",
    "a simdgroup prefix operation", "a simdgroup shuffle", "a simdgroup broadcast",
    "a simdgroup vote", "a quadgroup operation", "simdgroup_multiply_accumulate",
    "simdgroup_barrier", "threadgroup_barrier"};

void fail(const char* format, ...) {
  char* error = engine.counters.error;
  const size_t room = sizeof engine.counters.error;
  va_list arguments;
  va_start(arguments, format);
  size_t used = vsnprintf(error, room - 300, format, arguments);
  va_end(arguments);
  used = used < room - 300 ? used : room - 301;
  if (const Fiber* f = engine.current) {
    const u32* c = f->context;
    snprintf(error + used, room - used,
        "\n  thread %u (%u, %u, %u) of threadgroup (%u, %u, %u), simdgroup %u lane %u", f->index,
        c[3 * kPositionInThreadgroup], c[3 * kPositionInThreadgroup + 1],
        c[3 * kPositionInThreadgroup + 2], c[3 * kThreadgroupPosition],
        c[3 * kThreadgroupPosition + 1], c[3 * kThreadgroupPosition + 2], f->simdgroup, f->lane);
  }
  void* abandoned;
  switch_stack(&abandoned, engine.main_stack);
  abort();
}

static u64 random_number() {
  engine.random ^= engine.random << 13;
  engine.random ^= engine.random >> 7;
  return engine.random ^= engine.random << 17;
}

// The next fiber that can run, of this simdgroup if it has one: its slots are still in the cache.
static Fiber* pick(u32 simdgroup) {
  if (!engine.runnable) {
    return nullptr;
  }
  const bool shuffle = engine.launch->flags & kShuffled;
  if (shuffle) {
    simdgroup = random_number() % engine.simdgroup_count;
  }
  if (!(engine.runnable >> simdgroup & 1)) {
    const u32 later = engine.runnable & ~((2u << simdgroup) - 1);
    simdgroup = __builtin_ctz(later ? later : engine.runnable);
  }
  Simdgroup& s = engine.simdgroups[simdgroup];
  u32 lane = __builtin_ctz(s.ready);
  if (shuffle) {
    const u32 turn = random_number() % kLanes;
    const u32 turned = s.ready >> turn | (turn ? s.ready << (kLanes - turn) : 0);
    lane = (__builtin_ctz(turned) + turn) % kLanes;
  }
  s.ready &= ~(1u << lane);
  if (!s.ready) {
    engine.runnable &= ~(1u << simdgroup);
  }
  return &engine.fibers[simdgroup * kLanes + lane];
}

[[noreturn]] static void report_deadlock() {
  char text[6000];
  size_t used = 0;
  for (u32 i = 0; i < engine.simdgroup_count; i++) {
    const u32 live = engine.simdgroups[i].live;
    for (u32 lane = 0; lane < kLanes; lane++) {
      if (!(live >> lane & 1)) {
        continue;
      }
      const Fiber& f = engine.fibers[i * kLanes + lane];
      const u32 first = lane;
      while (lane + 1 < kLanes && live >> (lane + 1) & 1 &&
             (&f)[lane + 1 - first].waits_at == f.waits_at) {
        lane++;
      }
      if (used < sizeof text - 200) {
        used += snprintf(text + used, sizeof text - used,
            "\n  simdgroup %u lanes %u to %u wait in %s at <pc:%lx>", i, first, lane,
            kNames[f.waits_for], module_offset(f.waits_at));
      }
    }
  }
  text[used] = 0;
  engine.current = nullptr;
  fail("divergent synchronisation: no thread can go on (%u of %u have returned)%s",
      engine.threads - engine.live, engine.threads, text);
}

void release_simdgroup(Simdgroup& s, u32 except) {
  engine.counters.operations[s.operation]++;
  s.active = s.arrived;
  s.arrived = 0;
  if (s.finish) {
    s.finish(s);
  }
  for (u32 idle = ~s.active; idle; idle &= idle - 1) {
    memset(s.slots[s.parity][__builtin_ctz(idle)], 0xff, kSlotBytes);
  }
  s.parity ^= 1;
  s.ready |= s.active & ~except;
  if (s.ready) {
    engine.runnable |= 1u << (&s - engine.simdgroups);
  }
}

// A collective that only part of the lanes reach runs on those, if the launch allows it.
static Fiber* run_divergent(u32 simdgroup) {
  for (u32 i = 0; i < engine.simdgroup_count; i++) {
    if (engine.simdgroups[i].arrived) {
      release_simdgroup(engine.simdgroups[i], 0);
      return pick(simdgroup);
    }
  }
  return nullptr;
}

void wait_for_others(Fiber* me) {
  Fiber* next = pick(me->simdgroup);
  if (!next && engine.live == 0) {
    switch_stack(&me->stack_pointer, engine.main_stack);
  }
  if (!next && engine.launch->flags & kAllowDivergence) {
    next = run_divergent(me->simdgroup);
  }
  if (!next) {
    report_deadlock();
  }
  if (next == me) {
    return;
  }
  engine.counters.switches++;
  engine.current = next;
  switch_stack(&me->stack_pointer, next->stack_pointer);
}

static void run_fiber() {
  Fiber* me = engine.current;
  engine.launch->entry(engine.buffers, engine.threadgroup, me->context);
  settle();
  Simdgroup& s = engine.simdgroups[me->simdgroup];
  engine.live--;
  s.live &= ~(1u << me->lane);
  if (engine.at_barrier) {
    fail("a thread returned while %u others wait at threadgroup_barrier at <pc:%lx>",
        engine.at_barrier, module_offset(engine.barrier_pc));
  }
  if (s.arrived && s.arrived == s.live) {
    release_simdgroup(s, 0);
  }
  wait_for_others(me);
  abort();
}

static void set_context(Fiber& f, const u32 position[3], const u32 groups[3], const u32 size[3]) {
  const Launch& launch = *engine.launch;
  const u32 i = f.index;
  const u32 at[3] = {i % size[0], i / size[0] % size[1], i / (size[0] * size[1])};
  u32* c = f.context;
  for (u32 axis = 0; axis < 3; axis++) {
    c[3 * kPositionInGrid + axis] = position[axis] * launch.threads[axis] + at[axis];
    c[3 * kPositionInThreadgroup + axis] = at[axis];
    c[3 * kThreadgroupPosition + axis] = position[axis];
    c[3 * kThreadsPerGrid + axis] =
        launch.grid[axis] * (launch.flags & kGridIsThreads ? 1 : launch.threads[axis]);
    c[3 * kThreadsPerThreadgroup + axis] = size[axis];
    c[3 * kThreadgroupsPerGrid + axis] = groups[axis];
    c[3 * kDispatchThreadsPerThreadgroup + axis] = launch.threads[axis];
  }
  c[3 * kIndexInThreadgroup] = i;
  c[3 * kSimdgroupIndex] = f.simdgroup;
  c[3 * kIndexInSimdgroup] = f.lane;
  c[3 * kSimdgroupsPerThreadgroup] = engine.simdgroup_count;
  c[3 * kThreadsPerSimdgroup] = c[3 * kExecutionWidth] = kLanes;
  c[3 * kQuadgroupIndex] = i / 4;
  c[3 * kIndexInQuadgroup] = i % 4;
}

void run_threadgroup(const u32 position[3], const u32 groups[3]) {
  const Launch& launch = *engine.launch;
  u32 size[3];
  for (u32 axis = 0; axis < 3; axis++) { // the last threadgroups of a grid of threads are smaller
    const u32 first = position[axis] * launch.threads[axis];
    const bool cut =
        launch.flags & kGridIsThreads && first + launch.threads[axis] > launch.grid[axis];
    size[axis] = cut ? launch.grid[axis] - first : launch.threads[axis];
  }
  const u32 threads = engine.threads = engine.live = size[0] * size[1] * size[2];
  engine.simdgroup_count = (threads + kLanes - 1) / kLanes;
  engine.at_barrier = engine.runnable = 0;
  for (u32 i = 0; i < engine.simdgroup_count; i++) {
    Simdgroup& s = engine.simdgroups[i];
    const u32 lanes = threads - i * kLanes;
    s.live = s.ready = lanes >= kLanes ? ~0u : (1u << lanes) - 1;
    s.arrived = s.parity = 0;
    s.clock[kDevice] = s.clock[kThreadgroup] = {1, 1};
    engine.runnable |= 1u << i;
  }
  for (u32 i = 0; i < threads; i++) {
    Fiber& f = engine.fibers[i];
    f.index = i;
    f.lane = i % kLanes;
    f.simdgroup = i / kLanes;
    f.waits_for = kNothing;
    f.stack_pointer = fresh_stack(i, run_fiber);
    set_context(f, position, groups, size);
  }
  engine.slot_count = engine.threadgroup_used = engine.threadgroup_bytes = 0;
  begin_threadgroup_checks();
  engine.current = nullptr;
  for (u32 i = 0; i < kBuffers; i++) {
    const u64 bytes = launch.threadgroup_bytes[i];
    engine.threadgroup[i] = bytes ? (u64)threadgroup_slot(1000 + i, bytes, 16) : 0;
  }
  engine.counters.threads += threads;
  engine.counters.threadgroups++;
  engine.current = pick(0);
  switch_stack(&engine.main_stack, engine.current->stack_pointer);
  engine.current = nullptr;
}
