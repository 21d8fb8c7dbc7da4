// Stacks and the switch between them.
#include <string.h>
#include <sys/mman.h>

#include "runtime.h"

// Saves the callee-saved registers on the old stack, leaves its pointer in *save, and pops the same
// from the new one.
asm(R"(
.text
.globl __msl_switch_stack
.hidden __msl_switch_stack
.type __msl_switch_stack,@function
__msl_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size __msl_switch_stack, .-__msl_switch_stack
)");
constexpr u32 kSavedWords = 6;

constexpr u64 kStack = 65536, kStride = kStack + kPage; // a guard page below each
static u8* stacks;

bool prepare_stacks(u32 threads) {
  static u32 guarded;
  if (!stacks) {
    void* memory = mmap(nullptr, kMaxThreads * kStride, PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      return false;
    }
    stacks = (u8*)memory;
  }
  for (; guarded < threads; guarded++) {
    mprotect(stacks + guarded * kStride, kPage, PROT_NONE);
  }
  return true;
}

void* fresh_stack(u32 thread, void (*start)()) {
  // Tops at equal offsets would fight for the same cache sets, so they are spread.
  const u64 colour = (thread * 7 % 64) * 192;
  u64* top = (u64*)(stacks + (thread + 1) * kStride - 64 - colour);
  *--top = 0; // the return address of `start`, which never returns
  *--top = (u64)start;
  top -= kSavedWords;
  memset(top, 0, kSavedWords * 8);
  return top;
}

bool in_own_stack(u64 address) {
  const u64 bottom = (u64)stacks + engine.current->index * kStride + kPage;
  return address >= bottom && address < bottom + kStack;
}

bool in_guard_page(u64 address) {
  const u64 at = address - (u64)stacks;
  return stacks && at < kMaxThreads * kStride && at % kStride < kPage;
}
