#include "cpu/arena.h"

#include <cstdlib>
#include <new>
#include <unordered_map>

#if defined(__linux__)
#  include <sys/mman.h>
#endif

namespace fastdreamer {
namespace {

// Kept at most; a call that needs more still works, its memory goes back to the system.
constexpr Index kKeep = Index{1} << 30;
constexpr Index kHugePage = Index{2} << 20;

struct Pool {
  std::unordered_map<Index, std::vector<void*>> free;  // by size
  Index kept = 0, allocations = 0;
};

// Never destroyed: tapes may outlive static destructors.
Pool& pool() {
  static Pool* const p = new Pool;
  return *p;
}

// What a block takes of the system's memory.
Index whole(Index size) {
  const Index alignment = size >= kHugePage ? kHugePage : 64;
  return (size + alignment - 1) / alignment * alignment;
}

void* allocate(Index size) {
  const Index alignment = size >= kHugePage ? kHugePage : 64;
  return std::aligned_alloc(static_cast<std::size_t>(alignment),
                            static_cast<std::size_t>(whole(size)));
}

// Gives back to the system what nobody uses.
void drop(Pool& p) {
  for (auto& [size, blocks] : p.free) {
    for (void* data : blocks) std::free(data);
  }
  p.free.clear();
  p.kept = 0;
}

}  // namespace

void* Arena::bytes(Index size) {
  size = (size + 63) / 64 * 64 + 64;  // never empty; a vector past the end may be read, not used
  Pool& p = pool();
  const auto same = p.free.find(size);
  void* data;
  if (same != p.free.end() && !same->second.empty()) {
    data = same->second.back();
    same->second.pop_back();
    p.kept -= whole(size);
  } else {
    if (p.kept > kKeep / 2) drop(p);  // of sizes that were wanted once
    data = allocate(size);
    if (data == nullptr) {
      drop(p);
      data = allocate(size);
    }
    if (data == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    // activations of a whole horizon: fewer page faults and TLB misses
    if (size >= kHugePage) {
      madvise(data, static_cast<std::size_t>(whole(size)), MADV_HUGEPAGE);
    }
#endif
    ++p.allocations;
  }
  try {
    blocks_.push_back({data, size});
  } catch (...) {
    std::free(data);
    throw;
  }
  return data;
}

Arena::~Arena() {
  Pool& p = pool();
  for (const Block& block : blocks_) {
    if (p.kept + whole(block.size) > kKeep) {
      std::free(block.data);
    } else {
      p.free[block.size].push_back(block.data);
      p.kept += whole(block.size);
    }
  }
}

void arena_release() { drop(pool()); }

ArenaStats arena_stats() { return {pool().kept, pool().allocations}; }

}  // namespace fastdreamer
