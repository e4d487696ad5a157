// Splits work over OpenMP threads: the pool that torch's wheel loads, so that no second pool
// competes with torch's. Only code compiled for the baseline ISA may include this.
#pragma once

#include <algorithm>

#include "common/view.h"

#if defined(__SANITIZE_THREAD__)  // cannot see OpenMP's barriers; see tests/sanitize.py
#  include <atomic>
#  include <thread>
#  include <vector>
#elif defined(_OPENMP)
#  include <omp.h>
#endif

namespace fastdreamer {

// The number of threads to use where `threads` are allowed: one in a process that was forked, which
// has none of its parent's (OpenMP would wait for them for ever).
int usable_threads(int threads);

// Says that this process is one. Forks are seen from when the core is loaded on; this is for those
// before.
void note_fork();

#if defined(__SANITIZE_THREAD__)
// The same as the loops below, on threads that the sanitizer follows.
template <class Body>
void sanitized_loop(Index n, int threads, const Body& body) {
  std::atomic<Index> next{0};
  std::vector<std::thread> pool;
  for (int thread = 0; thread < threads; ++thread) {
    pool.emplace_back([&, thread] {
      for (Index i = next++; i < n; i = next++) body(i, thread);
    });
  }
  for (std::thread& thread : pool) thread.join();
}
#endif

inline int thread_index() {
#if defined(_OPENMP) && !defined(__SANITIZE_THREAD__)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Calls body(begin, end) on disjoint ranges that cover [0, n), at most `threads` of them, each but
// the last a multiple of 16 long (a cache line of floats, the widest vector) and at least `grain`.
template <class Body>
void parallel_for(Index n, Index grain, int threads, const Body& body) {
  const Index wanted = std::clamp<Index>(n / std::max<Index>(grain, 1), 1, usable_threads(threads));
  const Index size = ((n + wanted - 1) / wanted + 15) / 16 * 16;
  const Index ranges = (n + size - 1) / size;
  if (ranges <= 1) return body(Index{0}, n);
#if defined(__SANITIZE_THREAD__)
  sanitized_loop(ranges, static_cast<int>(ranges),
                 [&](Index i, int) { body(i * size, std::min(n, (i + 1) * size)); });
#else
#  pragma omp parallel for num_threads(static_cast<int>(ranges)) schedule(static, 1)
  for (Index i = 0; i < ranges; ++i) body(i * size, std::min(n, (i + 1) * size));
#endif
}

// Rows cut into tiles of equal size (the last may be smaller), as many for every thread.
struct Tiling {
  Index rows, size, count;
  int threads;

  // `most`: rows of a tile at most; `unit`, which divides it: of what tiles are a multiple.
  Tiling(Index rows, Index most, int allowed, Index unit = 1) : rows(rows) {
    const Index usable = std::clamp<Index>(rows, 1, usable_threads(allowed));
    const Index least_tiles = (rows + most - 1) / most;
    const Index tiles = (least_tiles + usable - 1) / usable * usable;
    size = ((rows + tiles - 1) / tiles + unit - 1) / unit * unit;
    count = (rows + size - 1) / size;
    threads = static_cast<int>(std::min(usable, count));
  }
};

// Calls body(begin, rows, thread) for every tile, on whichever thread is free: one that another
// program keeps from its core holds up a tile, not its share of them. `thread` < tiling.threads
// names its scratch.
template <class Body>
void parallel_tiles(const Tiling& tiling, const Body& body) {
  const auto tile = [&](Index i, int thread) {
    const Index begin = i * tiling.size;
    body(begin, std::min(tiling.size, tiling.rows - begin), thread);
  };
  if (tiling.threads <= 1) {
    for (Index i = 0; i < tiling.count; ++i) tile(i, 0);
    return;
  }
#if defined(__SANITIZE_THREAD__)
  sanitized_loop(tiling.count, tiling.threads, tile);
#else
#  pragma omp parallel for num_threads(tiling.threads) schedule(dynamic, 1)
  for (Index i = 0; i < tiling.count; ++i) tile(i, thread_index());
#endif
}

// Calls body(i, thread) for i in [0, n), in any order, on whichever thread is free.
template <class Body>
void parallel_tasks(Index n, int threads, const Body& body) {
  threads = static_cast<int>(std::clamp<Index>(n, 1, usable_threads(threads)));
  if (threads <= 1) {
    for (Index i = 0; i < n; ++i) body(i, 0);
    return;
  }
#if defined(__SANITIZE_THREAD__)
  sanitized_loop(n, threads, body);
#else
#  pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (Index i = 0; i < n; ++i) body(i, thread_index());
#endif
}

}  // namespace fastdreamer
