// The runtime that executes a compiled kernel: one fiber a thread, threadgroups one after another.
//
// A fiber runs until it has to wait: for its simdgroup (simd functions, simdgroup_barrier) or for
// its threadgroup (threadgroup_barrier). When no fiber can run, the kernel's synchronisation
// diverges, and the report says where each lane waits. One host thread, so nothing here is locked.
//
// A report is text in which <pc:HEX> is a code address (an offset into the module, just after the
// instruction) and <site:N> a threadgroup variable; emulator.py puts file, line and name there.
#pragma once
#include <pthread.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

constexpr u32 kBuffers = 31;
constexpr u32 kLanes = 32;
constexpr u32 kMaxThreads = 1024;
constexpr u32 kMaxSimdgroups = kMaxThreads / kLanes;
constexpr u32 kMaxThreadgroupBytes = 32768;
constexpr u32 kSlotBytes = 32; // what one lane can hand to another
constexpr u64 kPage = 4096;

// The order of BUILTINS in launcher.py; three numbers each.
enum Builtin {
  kPositionInGrid,
  kPositionInThreadgroup,
  kThreadgroupPosition,
  kThreadsPerGrid,
  kThreadsPerThreadgroup,
  kThreadgroupsPerGrid,
  kDispatchThreadsPerThreadgroup,
  kIndexInThreadgroup,
  kSimdgroupIndex,
  kIndexInSimdgroup,
  kSimdgroupsPerThreadgroup,
  kThreadsPerSimdgroup,
  kExecutionWidth,
  kQuadgroupIndex,
  kIndexInQuadgroup,
  kBuiltins
};

// The order of _simd_op in include/msl/simd.h, and of SIMD_OPERATIONS in emulator.py.
enum Operation {
  kNothing,
  kSum,
  kProduct,
  kMin,
  kMax,
  kAnd,
  kOr,
  kXor,
  kPrefix,
  kShuffle,
  kBroadcast,
  kVote,
  kQuad,
  kMultiply,
  kSimdgroupBarrier,
  kThreadgroupBarrier,
  kOperations
};

enum BufferFlags { kWritable = 1, kUnwritten = 2 }; // kUnwritten: contents undefined on entry
enum LaunchFlags { kAllowDivergence = 1, kShuffled = 2, kGridIsThreads = 4, kFlush = 8 };

// Mirrored in emulator.py.
struct BufferArgument {
  void* data;
  u64 bytes;
  u32 flags, unused;
};
struct Launch {
  void (*entry)(const u64* buffers, const u64* threadgroup, const u32* context);
  BufferArgument buffers[kBuffers];
  u64 threadgroup_bytes[kBuffers];
  u32 grid[3], threads[3];
  u32 flags, seconds;
  u64 seed; // of the schedule
  u64 chip; // of what Metal leaves to a chip; 0: exact functions, sums by neighbours
};
struct Counters {
  u64 threads, threadgroups, switches, barriers, simdgroup_barriers, threadgroup_memory;
  u64 operations[kOperations]; // once a simdgroup, not once a lane
  u64 loads[kBuffers], stores[kBuffers], bytes_read[kBuffers], bytes_written[kBuffers];
  u64 lines_read[kBuffers], lines_read_by_threadgroups[kBuffers], lines_written[kBuffers];
  u64 simdgroup_loads[kBuffers], lines_of_loads[kBuffers];
  u64 threadgroup_loads, threadgroup_stores, threadgroup_bytes_read, threadgroup_bytes_written;
  double seconds;
  char error[8192];
};

struct Fiber {
  void* stack_pointer;
  u32 lane, simdgroup, index;
  u32 waits_for; // an Operation
  void* waits_at;
  u32 context[kBuiltins * 3];
};

// Time of a simdgroup in the eyes of one kind of memory: it advances at barriers that order it.
struct Clock {
  u32 now, threadgroup; // `threadgroup`: when the whole threadgroup was last in step
};
enum Memory { kDevice, kThreadgroup, kMemories };

struct Simdgroup {
  u32 live, arrived, active, ready; // masks of lanes
  u32 operation, bytes, flags, parity;
  void* pc;
  void (*finish)(Simdgroup&);
  Clock clock[kMemories];
  // Two sets: a lane may read the last exchange while another already writes the next.
  alignas(32) u8 slots[2][kLanes][kSlotBytes];
};

struct Slot { // a threadgroup variable
  u32 site, offset, bytes;
};

struct Engine {
  const Launch* launch;
  Counters counters;
  void* main_stack;
  Fiber* current;
  Fiber fibers[kMaxThreads];
  Simdgroup simdgroups[kMaxSimdgroups];
  u32 threads, simdgroup_count, live;
  u32 at_barrier, barrier_flags;
  void* barrier_pc;
  u32 runnable; // mask of simdgroups with a ready lane
  u32 threadgroup_number;
  u64 random;
  u8 lanes[kLanes], inner[8]; // the chip's orders of sums
  bool armed; // inside a launch: with a current fiber, faults and accesses are the kernel's
  bool late;  // the time limit passed between two threadgroups
  pthread_t owner;
  void* last_call; // from the kernel into the runtime
  u64 buffers[kBuffers], threadgroup[kBuffers];
  Slot slots[256];
  u32 slot_count, threadgroup_used, threadgroup_bytes;
  alignas(64) u8 threadgroup_memory[2 * kMaxThreadgroupBytes];
};
extern Engine engine;

#define MSL_ENTRY extern "C" __attribute__((noinline, visibility("default")))

void switch_stack(void** save, void* to) __asm__("__msl_switch_stack");
bool prepare_stacks(u32 threads);
void* fresh_stack(u32 thread, void (*start)());
bool in_own_stack(u64 address);
bool in_guard_page(u64 address);

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);
void run_threadgroup(const u32 position[3], const u32 groups[3]);
void wait_for_others(Fiber* me);
void release_simdgroup(Simdgroup& simdgroup, u32 except);
void* threadgroup_slot(u32 site, u32 bytes, u32 align);

bool place_buffers();
void take_buffers_back();
[[noreturn]] void report_fault(u64 address, u64 pc, int signal);

#ifdef MSL_CHECK
bool make_shadow(u64 arena_bytes);
void shadow_buffer(u32 buffer, u64 offset, u64 bytes, u32 flags);
void drop_shadow();
void shadow_threadgroup(u32 offset, u32 bytes);
void begin_threadgroup_checks();
void settle();
void check_atomic(void* where, u32 bytes, bool reads, bool writes, void* pc);
void count_load(u32 buffer, u64 byte, u32 bytes, void* pc);
#else
static inline void shadow_threadgroup(u32, u32) {}
static inline void begin_threadgroup_checks() {}
static inline void settle() {}
static inline void check_atomic(void*, u32, bool, bool, void*) {}
#endif

// Where the buffers lie. Offsets are into the arena.
struct Arena {
  u8* base;
  u64 bytes;
  u64 offset[kBuffers], length[kBuffers];
};
extern Arena arena;

extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start;
extern "C" __attribute__((visibility("hidden"))) const char _end;
static inline u64 module_offset(const void* pc) {
  return (u64)pc - (u64)&__ehdr_start;
}
static inline bool in_module(u64 address) {
  return address >= (u64)&__ehdr_start && address < (u64)&_end;
}
