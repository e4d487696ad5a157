// Memory that is used again: what a call or a tape gives back, the next one of the same sizes gets,
// so that a steady state allocates nothing and touches no new pages.
//
// Not thread-safe: arenas are made, grown and destroyed with the GIL held (which is also why a fork
// never finds the pool half changed); the memory itself may be used without it.
#pragma once

#include <vector>

#include "common/view.h"

namespace fastdreamer {

class Arena {
 public:
  Arena() = default;
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Uninitialised, 64-byte aligned, valid as long as the arena. Throws bad_alloc.
  void* bytes(Index size);

  template <class T>
  T* take(Index count) {
    return static_cast<T*>(bytes(count * Index{sizeof(T)}));
  }

 private:
  struct Block {
    void* data;
    Index size;
  };
  std::vector<Block> blocks_;
};

// Bytes that the pool keeps for later, and how often it had to ask the system so far.
struct ArenaStats {
  Index kept;
  Index allocations;
};
ArenaStats arena_stats();

// Gives back to the system what the pool keeps.
void arena_release();

}  // namespace fastdreamer
