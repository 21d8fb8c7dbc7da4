// What threads do together: simdgroup operations, barriers, threadgroup variables, atomics.
#include <string.h>

#include "runtime.h"

// Hands in `bytes` bytes and waits for the live lanes of the simdgroup; returns the 32 slots.
// `finish` runs once, in the lane that comes last, on slots[parity] and the mask `active`.
static inline __attribute__((always_inline)) u8 (*meet(u32 operation, const void* mine, u32 bytes,
    void* pc, void (*finish)(Simdgroup&), u32 flags = 0)) [kSlotBytes] {
  settle();
  Fiber* me = engine.current;
  Simdgroup& s = engine.simdgroups[me->simdgroup];
  engine.last_call = me->waits_at = pc;
  me->waits_for = operation;
  if (!s.arrived) {
    s.operation = operation;
    s.bytes = bytes;
    s.pc = pc;
    s.finish = finish;
    s.flags = flags;
  } else if (s.operation != operation || s.bytes != bytes ||
             (s.pc != pc && !(engine.launch->flags & kAllowDivergence))) {
    fail(
        "simdgroup divergence: lanes of one simdgroup meet in different operations, at <pc:%lx> "
        "and "
        "at <pc:%lx>",
        module_offset(s.pc), module_offset(pc));
  }
  const u32 parity = s.parity;
  memcpy(s.slots[parity][me->lane], mine, bytes);
  s.arrived |= 1u << me->lane;
  if (s.arrived == s.live) {
    release_simdgroup(s, 1u << me->lane);
  } else {
    wait_for_others(me);
  }
  return s.slots[parity];
}

MSL_ENTRY const u8* __msl_exchange(const void* mine, u32 bytes, u32 operation) {
  return meet(operation, mine, bytes, __builtin_return_address(0), nullptr)[0];
}

template <class Combine>
static inline __attribute__((always_inline)) void reduce(Simdgroup& s) {
  float values[kLanes];
  u32 count = 0;
  for (const u8 lane : engine.lanes) {
    if (s.active >> lane & 1) {
      memcpy(&values[count++], s.slots[s.parity][lane], sizeof(float));
    }
  }
  for (u32 step = 1; step < count; step *= 2) {
    for (u32 i = 0; i + step < count; i += 2 * step) {
      values[i] = Combine::of(values[i], values[i + step]);
    }
  }
  for (u32 lanes = s.active; lanes; lanes &= lanes - 1) {
    memcpy(s.slots[s.parity][__builtin_ctz(lanes)], values, sizeof(float));
  }
}
struct Add {
  static float of(float a, float b) {
    return a + b;
  }
};
struct Larger { // a NaN loses to a number
  static float of(float a, float b) {
    return b != b ? a : (a < b || a != a) ? b : a;
  }
};
static float own_slot(const u8 (*slots)[kSlotBytes]) {
  float value;
  memcpy(&value, slots[engine.current->lane], sizeof value);
  return value;
}
MSL_ENTRY float __msl_sum(float mine) {
  return own_slot(meet(kSum, &mine, sizeof mine, __builtin_return_address(0), reduce<Add>));
}
MSL_ENTRY float __msl_max(float mine) {
  return own_slot(meet(kMax, &mine, sizeof mine, __builtin_return_address(0), reduce<Larger>));
}

// An 8x8 matrix over 32 lanes, two neighbours of a row a lane: see include/msl/matrix.h.
static inline u32 row_of(u32 lane) {
  return ((lane >> 2) & 4) + ((lane >> 1) & 3);
}
static inline u32 column_of(u32 lane) {
  return ((lane >> 1) & 4) + (lane & 1) * 2;
}
static void multiply(Simdgroup& s) {
  float a[8][8], b[8][8], c[8][8];
  for (u32 lane = 0; lane < kLanes; lane++) {
    float six[6];
    memcpy(six, s.slots[s.parity][lane], sizeof six);
    const u32 row = row_of(lane), column = column_of(lane);
    memcpy(&a[row][column], six, 8);
    memcpy(&b[row][column], six + 2, 8);
    memcpy(&c[row][column], six + 4, 8);
  }
  for (u32 row = 0; row < 8; row++) {
    for (const u8 inner : engine.inner) {
      for (u32 column = 0; column < 8; column++) {
        c[row][column] += a[row][inner] * b[inner][column];
      }
    }
  }
  for (u32 lane = 0; lane < kLanes; lane++) {
    memcpy(s.slots[s.parity][lane], &c[row_of(lane)][column_of(lane)], 8);
  }
}
MSL_ENTRY void __msl_multiply(float* six) {
  const Simdgroup& s = engine.simdgroups[engine.current->simdgroup];
  if (s.live != ~0u) {
    fail("simdgroup_multiply_accumulate by %d of 32 lanes, at <pc:%lx>", __builtin_popcount(s.live),
        module_offset(__builtin_return_address(0)));
  }
  const u8(*slots)[kSlotBytes] = meet(kMultiply, six, 24, __builtin_return_address(0), multiply);
  memcpy(six, slots[engine.current->lane], 8);
}

MSL_ENTRY u32 __msl_lane() {
  return engine.current->lane;
}
MSL_ENTRY u32 __msl_active() {
  return engine.simdgroups[engine.current->simdgroup].active;
}

// Only the memory that a barrier names is in order after it.
static void advance(Simdgroup& s, u32 flags, bool whole_threadgroup) {
  for (u32 memory = 0; memory < kMemories; memory++) {
    if (flags >> memory & 1) {
      const u32 now = ++s.clock[memory].now;
      s.clock[memory].threadgroup = whole_threadgroup ? now : s.clock[memory].threadgroup;
    }
  }
}
MSL_ENTRY void __msl_simdgroup_barrier(u32 flags) {
#ifndef MSL_CHECK
  if (!flags) { // orders no memory: a hint to the compiler, and half of all switches in steel
    return;
  }
#endif
  const auto finish = [](Simdgroup& s) {
    engine.counters.simdgroup_barriers++;
    advance(s, s.flags, false);
  };
  meet(kSimdgroupBarrier, &flags, sizeof flags, __builtin_return_address(0), finish, flags);
}
MSL_ENTRY void __msl_threadgroup_barrier(u32 flags) {
  settle();
  Fiber* me = engine.current;
  void* pc = engine.last_call = me->waits_at = __builtin_return_address(0);
  me->waits_for = kThreadgroupBarrier;
  if (engine.live != engine.threads) {
    fail("threadgroup_barrier at <pc:%lx> after %u of %u threads have returned", module_offset(pc),
        engine.threads - engine.live, engine.threads);
  }
  if (!engine.at_barrier) {
    engine.barrier_pc = pc;
  } else if (engine.barrier_pc != pc) {
    fail("divergent barriers: some threads wait at <pc:%lx>, others at <pc:%lx>",
        module_offset(engine.barrier_pc), module_offset(pc));
  }
  if (++engine.at_barrier < engine.threads) {
    wait_for_others(me);
    return;
  }
  engine.at_barrier = 0;
  engine.counters.barriers++;
  engine.counters.operations[kThreadgroupBarrier]++;
  for (u32 i = 0; i < engine.simdgroup_count; i++) {
    Simdgroup& s = engine.simdgroups[i];
    advance(s, flags, true);
    s.ready = s.live & ~(i == me->simdgroup ? 1u << me->lane : 0);
    engine.runnable |= s.ready ? 1u << i : 0;
  }
}

// The first thread to reach a threadgroup variable gives it its place, filled with poison.
void* threadgroup_slot(u32 site, u32 bytes, u32 align) {
  constexpr u32 kRedZone = 64;
  for (u32 i = 0; i < engine.slot_count; i++) {
    if (engine.slots[i].site == site) {
      return engine.threadgroup_memory + engine.slots[i].offset;
    }
  }
  engine.threadgroup_bytes += bytes;
  if (engine.threadgroup_bytes > kMaxThreadgroupBytes || engine.slot_count == 256) {
    fail("threadgroup memory over 32 KiB: %u bytes with <site:%u>", engine.threadgroup_bytes, site);
  }
  if (engine.threadgroup_bytes > engine.counters.threadgroup_memory) {
    engine.counters.threadgroup_memory = engine.threadgroup_bytes;
  }
  const u32 unit = align < 16 ? 16 : align;
  const u32 offset = (engine.threadgroup_used + kRedZone + unit - 1) / unit * unit;
  engine.threadgroup_used = offset + bytes;
  engine.slots[engine.slot_count++] = {site, offset, bytes};
  memset(engine.threadgroup_memory + offset, 0xff, bytes);
  shadow_threadgroup(offset, bytes);
  return engine.threadgroup_memory + offset;
}
MSL_ENTRY void* __msl_threadgroup_slot(u32 site, u32 bytes, u32 align) {
  return threadgroup_slot(site, bytes, align);
}

// The callee of -fsanitize=array-bounds, with the head of what it describes.
struct OutOfBounds {
  const char* file;
  u32 line, column;
  struct Type {
    u16 kind, info;
    char name[1];
  } const* array;
};
MSL_ENTRY void __ubsan_handle_out_of_bounds_abort(const OutOfBounds* at, u64 index) {
  fail("index %ld out of bounds of an array %s, at %s:%u", (long)index, at->array->name, at->file,
      at->line);
}

// The order of _atomic_op in include/msl/atomic.h.
enum AtomicOperation {
  kLoad,
  kStore,
  kExchange,
  kCompare,
  kAdd,
  kSub,
  kAddFloat,
  kBitAnd,
  kBitOr,
  kBitXor,
  kMinSigned,
  kMaxSigned,
  kMinUnsigned,
  kMaxUnsigned
};

static float as_float(u64 bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
static u64 as_bits(float value) {
  u64 bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}
static u64 combine(u32 operation, u64 old, u64 with, u32 bytes) {
  const int64_t old_signed = bytes == 4 ? (int32_t)old : (int64_t)old;
  const int64_t with_signed = bytes == 4 ? (int32_t)with : (int64_t)with;
  switch (operation) {
    case kAdd:
      return old + with;
    case kSub:
      return old - with;
    case kAddFloat:
      return as_bits(as_float(old) + as_float(with));
    case kBitAnd:
      return old & with;
    case kBitOr:
      return old | with;
    case kBitXor:
      return old ^ with;
    case kMinSigned:
      return with_signed < old_signed ? with : old;
    case kMaxSigned:
      return old_signed < with_signed ? with : old;
    case kMinUnsigned:
      return with < old ? with : old;
    case kMaxUnsigned:
      return old < with ? with : old;
    default:
      return with;
  }
}
MSL_ENTRY u64 __msl_atomic(void* where, u32 bytes, u32 operation, u64 operand, u64 expected) {
  engine.last_call = __builtin_return_address(0);
  check_atomic(where, bytes, operation != kStore, operation != kLoad, __builtin_return_address(0));
  u64 old = 0;
  memcpy(&old, where, bytes);
  if (operation == kLoad || (operation == kCompare && old != expected)) {
    return old;
  }
  const u64 fresh = combine(operation, old, operand, bytes);
  memcpy(where, &fresh, bytes);
  return old;
}
