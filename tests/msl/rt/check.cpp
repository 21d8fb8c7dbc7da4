// The checked build. clang's -fsanitize=thread puts a call before every memory access; these are
// the callees: bounds, unwritten bytes, writes to inputs, races, and the byte counts.
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "races.cpp"
#include "runtime.h"

#ifdef MSL_CHECK

// One byte of shadow a byte of device memory: buffer number + 1, and two flags.
constexpr u8 kOwner = 31, kReadOnly = 32, kWritten = 64;
struct Line {
  u32 reader; // the last threadgroup + 1 that loaded it
  u32 written;
};

static u8* shadow;
static Cell* cells;
static Line* lines;
static u64 first_line[kBuffers];
static Cell threadgroup_cells[2 * kMaxThreadgroupBytes];
static u8 threadgroup_shadow[2 * kMaxThreadgroupBytes]; // 0 nothing, 1 unwritten, 3 written

template <class T>
static T* reserve(u64 count) {
  void* memory = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE,
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return memory == MAP_FAILED ? nullptr : (T*)memory;
}

static u64 line_count() {
  return arena.bytes / 64 + kBuffers;
}

bool make_shadow(u64 bytes) {
  memset(threadgroup_cells, 0, sizeof threadgroup_cells); // threadgroups count from 0 again
  shadow = reserve<u8>(bytes);
  cells = reserve<Cell>(bytes);
  lines = reserve<Line>(line_count());
  return shadow && cells && lines;
}

void drop_shadow() {
  munmap(shadow, arena.bytes);
  munmap(cells, arena.bytes * sizeof(Cell));
  munmap(lines, line_count() * sizeof(Line));
}

void shadow_buffer(u32 buffer, u64 offset, u64 bytes, u32 flags) {
  const u8 state =
      (buffer + 1) | (flags & kWritable ? 0 : kReadOnly) | (flags & kUnwritten ? 0 : kWritten);
  memset(shadow + offset, state, bytes);
  first_line[buffer] = offset / 64 + buffer;
}

void begin_threadgroup_checks() {
  memset(threadgroup_shadow, 0, sizeof threadgroup_shadow);
  pending.where = nullptr;
}

void shadow_threadgroup(u32 offset, u32 bytes) {
  memset(threadgroup_shadow + offset, 1, bytes);
}

static void count_lines(u32 buffer, u64 byte, u32 bytes, bool writes) {
  Counters& c = engine.counters;
  for (u64 line = byte / 64; line <= (byte + bytes - 1) / 64; line++) {
    Line& l = lines[first_line[buffer] + line];
    if (writes) {
      c.lines_written[buffer] += !l.written;
      l.written = 1;
    } else if (l.reader != engine.threadgroup_number + 1) {
      c.lines_read[buffer] += !l.reader;
      c.lines_read_by_threadgroups[buffer]++;
      l.reader = engine.threadgroup_number + 1;
    }
  }
}

[[noreturn]] static void report_bounds(u64 offset, u32 bytes, bool writes, void* pc) {
  u32 nearest = kBuffers;
  long distance = 0;
  for (u32 i = 0; i < kBuffers; i++) {
    const long from = (long)(offset - arena.offset[i]);
    const long away = from < 0 ? -from : from - (long)arena.length[i];
    if (engine.launch->buffers[i].data && (nearest == kBuffers || away < distance)) {
      nearest = i;
      distance = away;
    }
  }
  if (offset < kBuffers * kPage || nearest == kBuffers) {
    fail("%s of buffer(%lu), which is not bound, at <pc:%lx>", writes ? "store" : "load",
        offset / kPage, module_offset(pc));
  }
  fail("out-of-bounds %s of %u bytes at byte %ld of buffer(%u), which has %lu bytes, at <pc:%lx>",
      writes ? "store" : "load", bytes, (long)(offset - arena.offset[nearest]), nearest,
      arena.length[nearest], module_offset(pc));
}

static void device_access(u64 offset, u32 bytes, bool writes, bool atomic, void* pc) {
  u8* state = shadow + offset;
  const u8 owner = state[0] & kOwner;
  bool inside = owner, written = true;
  for (u32 i = 0; i < bytes; i++) {
    inside &= (state[i] & kOwner) == owner;
    written &= (state[i] & kWritten) != 0;
  }
  if (!inside) {
    report_bounds(offset, bytes, writes, pc);
  }
  const u32 buffer = owner - 1;
  const u64 byte = offset - arena.offset[buffer];
  Counters& c = engine.counters;
  count_lines(buffer, byte, bytes, writes);
  if (writes) {
    if (state[0] & kReadOnly) {
      fail("store to byte %lu of buffer(%u), which is an input, at <pc:%lx>", byte, buffer,
          module_offset(pc));
    }
    c.stores[buffer]++;
    c.bytes_written[buffer] += bytes;
    for (u32 i = 0; i < bytes; i++) {
      state[i] |= kWritten;
    }
  } else {
    count_load(buffer, byte, bytes, pc);
    c.loads[buffer]++;
    c.bytes_read[buffer] += bytes;
    if (!written) {
      fail("load of unwritten bytes at byte %lu of buffer(%u), at <pc:%lx>", byte, buffer,
          module_offset(pc));
    }
  }
  if (!(state[0] & kReadOnly)) {
    const auto place = [](u64 at) { return device_place((shadow[at] & kOwner) - 1, at); };
    track(kDevice, cells + offset, arena.base + offset, bytes, writes, atomic, pc, place, offset);
  }
}

static void threadgroup_access(u32 offset, u32 bytes, bool writes, bool atomic, void* pc) {
  Counters& c = engine.counters;
  (writes ? c.threadgroup_stores : c.threadgroup_loads)++;
  (writes ? c.threadgroup_bytes_written : c.threadgroup_bytes_read) += bytes;
  for (u32 i = offset; i < offset + bytes; i++) {
    if (!threadgroup_shadow[i]) {
      fail("out-of-bounds %s at %s, at <pc:%lx>", writes ? "store" : "load",
          threadgroup_place(offset).text, module_offset(pc));
    }
    if (writes) {
      threadgroup_shadow[i] = 3;
    } else if (threadgroup_shadow[i] == 1) {
      fail("load of unwritten bytes at %s, at <pc:%lx>", threadgroup_place(i).text,
          module_offset(pc));
    }
  }
  const auto place = [](u64 at) { return threadgroup_place((u32)at); };
  track(kThreadgroup, threadgroup_cells + offset, engine.threadgroup_memory + offset, bytes, writes,
      atomic, pc, place, offset);
}

static inline void access(void* where, u32 bytes, bool writes, void* pc, bool atomic = false) {
  if (!engine.armed) {
    return;
  }
  settle();
  engine.last_call = pc;
  const u64 address = (u64)where;
  if (in_own_stack(address)) {
    return;
  }
  if (address - (u64)arena.base < arena.bytes) {
    device_access(address - (u64)arena.base, bytes, writes, atomic, pc);
  } else if (address - (u64)engine.threadgroup_memory < sizeof engine.threadgroup_memory) {
    threadgroup_access(address - (u64)engine.threadgroup_memory, bytes, writes, atomic, pc);
  } else if (!in_module(address)) { // constants and the runtime's own slots lie in the module
    fail("%s of %u bytes at address 0x%lx, which is in no buffer, at <pc:%lx>",
        writes ? "store" : "load", bytes, address, module_offset(pc));
  }
}

// An access that the compiler believes aligned: Metal wants it so, and so does the processor.
static inline void aligned(void* where, u32 bytes, bool writes, void* pc) {
  if (bytes > 1 && (u64)where % (bytes < 8 ? bytes : 8)) {
    fail("misaligned %s of %u bytes at address 0x%lx, at <pc:%lx>", writes ? "store" : "load",
        bytes, (u64)where, module_offset(pc));
  }
  access(where, bytes, writes, pc);
}

void check_atomic(void* where, u32 bytes, bool reads, bool writes, void* pc) {
  if (reads) {
    access(where, bytes, false, pc, true);
  }
  if (writes) {
    access(where, bytes, true, pc, true);
  }
}

static void access_range(const void* where, u64 bytes, bool writes, void* pc) {
  for (u64 i = 0; i < bytes; i += 16) {
    access((u8*)where + i, bytes - i < 16 ? bytes - i : 16, writes, pc);
  }
}

#define MSL_PC __builtin_return_address(0)
#define MSL_CALLBACKS(N)                                   \
  MSL_ENTRY void __tsan_read##N(void* p) {                 \
    aligned(p, N, false, MSL_PC);                          \
  }                                                        \
  MSL_ENTRY void __tsan_write##N(void* p) {                \
    aligned(p, N, true, MSL_PC);                           \
  }                                                        \
  MSL_ENTRY void __tsan_unaligned_read##N(void* p) {       \
    access(p, N, false, MSL_PC);                           \
  }                                                        \
  MSL_ENTRY void __tsan_unaligned_write##N(void* p) {      \
    access(p, N, true, MSL_PC);                            \
  }                                                        \
  MSL_ENTRY void __tsan_read_write##N(void* p) {           \
    aligned(p, N, false, MSL_PC);                          \
    access(p, N, true, MSL_PC);                            \
  }                                                        \
  MSL_ENTRY void __tsan_unaligned_read_write##N(void* p) { \
    access(p, N, false, MSL_PC);                           \
    access(p, N, true, MSL_PC);                            \
  }
MSL_CALLBACKS(1)
MSL_CALLBACKS(2)
MSL_CALLBACKS(4)
MSL_CALLBACKS(8)
MSL_CALLBACKS(16)

MSL_ENTRY void* __tsan_memcpy(void* to, const void* from, u64 bytes) {
  access_range(from, bytes, false, MSL_PC);
  access_range(to, bytes, true, MSL_PC);
  return memcpy(to, from, bytes);
}
MSL_ENTRY void* __tsan_memmove(void* to, const void* from, u64 bytes) {
  access_range(from, bytes, false, MSL_PC);
  access_range(to, bytes, true, MSL_PC);
  return memmove(to, from, bytes);
}
MSL_ENTRY void* __tsan_memset(void* to, int value, u64 bytes) {
  access_range(to, bytes, true, MSL_PC);
  return memset(to, value, bytes);
}
MSL_ENTRY void __tsan_init() {}
MSL_ENTRY void __tsan_func_entry(void*) {}
MSL_ENTRY void __tsan_func_exit() {}

#endif
