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

}  // namespace

void* Arena::bytes(Index size) {
  size = (size + 63) / 64 * 64 + 64;  // never empty; a vector past the end may be read, not used
  blocks_.reserve(blocks_.size() + 1);
  Pool& p = pool();
  std::vector<void*>& same = p.free[size];
  void* data;
  if (!same.empty()) {
    data = same.back();
    same.pop_back();
    p.kept -= size;
  } else {
    const Index alignment = size >= kHugePage ? kHugePage : 64;
    const Index whole = (size + alignment - 1) / alignment * alignment;
    data = std::aligned_alloc(static_cast<std::size_t>(alignment), static_cast<std::size_t>(whole));
    if (data == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    // activations of a whole horizon: fewer page faults and TLB misses
    if (alignment == kHugePage) madvise(data, static_cast<std::size_t>(whole), MADV_HUGEPAGE);
#endif
    ++p.allocations;
  }
  blocks_.push_back({data, size});
  return data;
}

void Arena::clear() {
  Pool& p = pool();
  for (const Block& block : blocks_) {
    if (p.kept + block.size > kKeep) {
      std::free(block.data);
    } else {
      p.free[block.size].push_back(block.data);
      p.kept += block.size;
    }
  }
  blocks_.clear();
}

Arena::~Arena() { clear(); }

ArenaStats arena_stats() { return {pool().kept, pool().allocations}; }

}  // namespace fastdreamer
