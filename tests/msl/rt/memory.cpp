// Device buffers: copies that end at a guard page, so that even the fast build catches an overrun.
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "runtime.h"

Arena arena;

constexpr u64 kGap = 1 << 20; // no access between buffers
// Where arguments without a buffer point. Optimised code may load through a reference before the
// test that guards it, so the fast build must be able to read there; the checked build loads
// nothing early.
#ifdef MSL_CHECK
constexpr int kUnboundAccess = PROT_NONE;
#else
constexpr int kUnboundAccess = PROT_READ;
#endif

static u64 span_of(u64 bytes) {
  return bytes ? (bytes + kPage - 1) / kPage * kPage : kPage;
}

bool place_buffers() {
  const Launch& launch = *engine.launch;
  arena.bytes = kGap + kBuffers * kPage;
  for (const BufferArgument& buffer : launch.buffers) {
    arena.bytes += buffer.data ? span_of(buffer.bytes) + kGap : 0;
  }
  void* memory =
      mmap(nullptr, arena.bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    return false;
  }
  arena.base = (u8*)memory;
#ifdef MSL_CHECK
  if (!make_shadow(arena.bytes)) {
    munmap(arena.base, arena.bytes);
    return false;
  }
#endif
  mprotect(arena.base, kBuffers * kPage, kUnboundAccess);
  u64 offset = kBuffers * kPage + kGap;
  for (u32 i = 0; i < kBuffers; i++) {
    const BufferArgument& buffer = launch.buffers[i];
    if (!buffer.data) {
      arena.length[i] = 0;
      engine.buffers[i] = (u64)arena.base + i * kPage;
      continue;
    }
    const u64 span = span_of(buffer.bytes);
    mprotect(arena.base + offset, span, PROT_READ | PROT_WRITE);
    arena.offset[i] = offset + span - (buffer.bytes + 15) / 16 * 16; // aligned as float4 wants it
    arena.length[i] = buffer.bytes;
    u8* data = arena.base + arena.offset[i];
    engine.buffers[i] = (u64)data;
    if (buffer.flags & kUnwritten) {
      memset(data, 0xff, buffer.bytes);
    } else {
      memcpy(data, buffer.data, buffer.bytes);
    }
#ifdef MSL_CHECK
    shadow_buffer(i, arena.offset[i], buffer.bytes, buffer.flags);
#endif
    offset += span + kGap;
  }
  return true;
}

void take_buffers_back() {
  for (u32 i = 0; i < kBuffers; i++) {
    const BufferArgument& buffer = engine.launch->buffers[i];
    if (buffer.data && buffer.flags & kWritable) {
      memcpy(buffer.data, arena.base + arena.offset[i], buffer.bytes);
    }
  }
#ifdef MSL_CHECK
  drop_shadow();
#endif
  munmap(arena.base, arena.bytes);
}

void report_fault(u64 address, u64 pc, int signal) {
  const u64 at = pc - (u64)&__ehdr_start + 1; // a report's address lies after the instruction
  if (signal == SIGILL) {
    fail("index out of bounds of a fixed-size array, at <pc:%lx>", at);
  }
  if (signal == SIGFPE) {
    fail("integer division by zero, at <pc:%lx>", at);
  }
  if (in_guard_page(address)) {
    fail("stack overflow: a thread has more than 60 KiB of private variables, at <pc:%lx>", at);
  }
  const u64 offset = address - (u64)arena.base;
  if (offset < kBuffers * kPage) {
    fail("access to buffer(%lu), which is not bound, at <pc:%lx>", offset / kPage, at);
  }
  u32 nearest = kBuffers;
  long distance = 0, byte = 0;
  for (u32 i = 0; i < kBuffers; i++) {
    if (!engine.launch->buffers[i].data) {
      continue;
    }
    const long from_start = (long)(offset - arena.offset[i]);
    const long away = from_start < 0 ? -from_start : from_start - (long)arena.length[i];
    if (nearest == kBuffers || away < distance) {
      nearest = i;
      distance = away;
      byte = from_start;
    }
  }
  if (nearest == kBuffers || offset >= arena.bytes) {
    fail("access to address 0x%lx, which is in no buffer, at <pc:%lx>", address, at);
  }
  fail("out-of-bounds access at byte %ld of buffer(%u), which has %lu bytes, at <pc:%lx>", byte,
      nearest, arena.length[nearest], at);
}
