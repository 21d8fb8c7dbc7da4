// The checked build's race detector: who touched each byte last, and whether a barrier lies
// between.
#include <stdio.h>
#include <string.h>

#include "runtime.h"

#ifdef MSL_CHECK

// Who touched a byte, and when: atomic 1 | threadgroup 23 | thread 10 | clock 30 bits. 0 is nobody.
typedef u64 Stamp;
struct Cell {
  Stamp writer, reader, other_reader;
};
// Two threads that store the same value race only on paper: MLX's ragged kernels do it. So a
// suspicious store is judged at the thread's next step, when its value is there to be seen.
static struct {
  u8* where;
  u32 bytes;
  u8 old[16];
  char report[400];
} pending;

void settle() {
  if (!pending.where) {
    return;
  }
  const bool changed = memcmp(pending.where, pending.old, pending.bytes);
  pending.where = nullptr;
  if (changed) {
    fail("%s", pending.report);
  }
}

constexpr u32 kClockBits = 30, kThreadBits = 10;
static Stamp stamp(Memory memory, bool atomic) {
  const Fiber& f = *engine.current;
  return (u64)atomic << 63 | (u64)(engine.threadgroup_number + 1) << (kClockBits + kThreadBits) |
         (u64)f.index << kClockBits | engine.simdgroups[f.simdgroup].clock[memory].now;
}
static u32 thread_of(Stamp s) {
  return s >> kClockBits & ((1 << kThreadBits) - 1);
}
static u32 threadgroup_of(Stamp s) {
  return (s >> (kClockBits + kThreadBits) & 0x7fffff) - 1;
}

// Whether the access `past` is unordered with one that the current thread makes now.
static bool conflicts(Memory memory, Stamp past, bool atomic) {
  if (!past || (atomic && past >> 63)) {
    return false;
  }
  if (threadgroup_of(past) != engine.threadgroup_number) {
    return memory == kDevice; // threadgroup memory is another threadgroup's: forgotten
  }
  const Fiber& me = *engine.current;
  const u32 thread = thread_of(past);
  if (thread == me.index) {
    return false;
  }
  const Clock& clock = engine.simdgroups[thread / kLanes].clock[memory];
  const u32 in_step = thread / kLanes == me.simdgroup ? clock.now : clock.threadgroup;
  return (past & ((1u << kClockBits) - 1)) >= in_step;
}

struct Place {
  char text[96];
};
static Place device_place(u32 buffer, u64 offset) {
  Place place;
  snprintf(place.text, sizeof place.text, "byte %ld of buffer(%u)",
      (long)(offset - arena.offset[buffer]), buffer);
  return place;
}
static Place threadgroup_place(u32 offset) {
  Place place;
  snprintf(place.text, sizeof place.text, "byte %u of threadgroup memory", offset);
  long nearest = 1 << 30;
  for (u32 i = 0; i < engine.slot_count; i++) {
    const Slot& slot = engine.slots[i];
    const long from = (long)offset - slot.offset;
    const long away = from < 0 ? -from : from < slot.bytes ? 0 : from - slot.bytes + 1;
    if (away < nearest) {
      nearest = away;
      snprintf(place.text, sizeof place.text, "byte %ld of <site:%u>, which has %u bytes", from,
          slot.site, slot.bytes);
    }
  }
  return place;
}

static void report_race(Memory memory, Stamp past, const char* past_access, bool writes,
    const Place& place, void* pc, u8* where, u32 bytes) {
  const bool own = threadgroup_of(past) == engine.threadgroup_number;
  char report[sizeof pending.report];
  snprintf(report, sizeof report,
      "race: %s of %s, %s by %s %u with no barrier between that orders %s memory, at <pc:%lx>",
      writes ? "store" : "load", place.text, past_access, own ? "thread" : "threadgroup",
      own ? thread_of(past) : threadgroup_of(past), memory == kDevice ? "device" : "threadgroup",
      module_offset(pc));
  if (!writes) {
    fail("%s", report);
  }
  pending.where = where;
  pending.bytes = bytes;
  memcpy(pending.old, where, bytes);
  memcpy(pending.report, report, sizeof report);
}

static void track(Memory memory, Cell* cell, u8* where, u32 bytes, bool writes, bool atomic,
    void* pc, Place (*place)(u64), u64 at) {
  const Stamp now = stamp(memory, atomic);
  for (u32 i = 0; i < bytes; i++, cell++) {
    if (conflicts(memory, cell->writer, atomic) && !pending.where) {
      report_race(memory, cell->writer, "written", writes, place(at + i), pc, where, bytes);
    }
    if (!writes) {
      if (cell->reader >> kClockBits != now >> kClockBits) {
        cell->other_reader = cell->reader;
      }
      cell->reader = now;
      continue;
    }
    const Stamp readers[] = {cell->reader, cell->other_reader};
    for (const Stamp reader : readers) {
      if (conflicts(memory, reader, atomic) && !pending.where) {
        report_race(memory, reader, "read", writes, place(at + i), pc, where, bytes);
      }
    }
    cell->writer = now;
  }
}

#endif
