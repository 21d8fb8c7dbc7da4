// Loads of device memory as a GPU makes them: the lanes of a simdgroup load together, so a load
// costs as many lines as they touch. A lane's n-th load at an instruction belongs to the n-th of
// the others.
#include "runtime.h"

#ifdef MSL_CHECK

// Keys are 64-bit hashes, which are taken for what they are made of. A table that is half full
// begins anew, so that a load in the middle may be counted twice.
constexpr u32 kSlots = 1 << 16;
struct Tally {
  u64 key;
  u32 count;
};
static Tally tallies[kSlots];
static u32 tallied;

static u64 mixed(u64 a, u64 b) {
  a = (a ^ (b + 0x9e3779b97f4a7c15 + (a << 6))) * 0xbf58476d1ce4e5b9;
  return a ^ a >> 31;
}

// How often it was asked for this key before.
static u32 tally(u64 key) {
  key |= 1;
  u32 at = key >> 40 & (kSlots - 1);
  while (tallies[at].key && tallies[at].key != key) {
    at = (at + 1) & (kSlots - 1);
  }
  if (!tallies[at].key) {
    if (2 * ++tallied > kSlots) {
      memset(tallies, 0, sizeof tallies);
      tallied = 0;
      return tally(key);
    }
    tallies[at].key = key;
  }
  return tallies[at].count++;
}

void count_load(u32 buffer, u64 byte, u32 bytes, void* pc) {
  Counters& c = engine.counters;
  const u64 place = mixed((u64)pc, engine.threadgroup_number);
  const u32 visit = tally(mixed(place, engine.current->index));
  const u64 load = mixed(mixed(place, visit), kMaxThreads + engine.current->simdgroup);
  c.simdgroup_loads[buffer] += !tally(load);
  for (u64 line = byte / 64; line <= (byte + bytes - 1) / 64; line++) {
    c.lines_of_loads[buffer] += !tally(mixed(mixed(load, buffer), line));
  }
}

#endif
