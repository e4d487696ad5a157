// Splits a range over OpenMP threads: the pool that torch's wheel loads, so that no second pool
// competes with torch's. Only code compiled for the baseline ISA may include this.
#pragma once

#include <algorithm>

#include "common/view.h"

namespace fastdreamer {

// Calls body(begin, end) on disjoint ranges that cover [0, n), at most `threads` of them, each but
// the last a multiple of 16 long (a cache line of floats, the widest vector) and at least `grain`.
template <class Body>
void parallel_for(Index n, Index grain, int threads, const Body& body) {
  const Index wanted = std::clamp<Index>(n / std::max<Index>(grain, 1), 1, threads);
  const Index size = ((n + wanted - 1) / wanted + 15) / 16 * 16;
  const Index ranges = (n + size - 1) / size;
  if (ranges <= 1) return body(Index{0}, n);
#pragma omp parallel for num_threads(static_cast<int>(ranges)) schedule(static, 1)
  for (Index i = 0; i < ranges; ++i) body(i * size, std::min(n, (i + 1) * size));
}

}  // namespace fastdreamer
