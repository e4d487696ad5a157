// How a call is cut into tasks of its rows, and what a thread does before and after one.
#pragma once

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace fastdreamer {

// The table for a call of `rows` rows. Of all of them, not of a thread's: results are equal for
// every number of threads.
inline const Kernels& kernels_for(const Kernels& k, Index rows) {
  return rows < k.few_rows ? *k.few : k;
}

// The tiles of such a call: enough rows to make weights cheap, few enough that a layer's
// activations stay in L2.
inline Tiling tiling_for(const Kernels& k, Index rows, int threads) {
  const Kernels& own = kernels_for(k, rows);
  return Tiling(rows, own.tile_rows, threads, own.tile_unit);
}

// Lives as long as a thread works on `rows` of the `all` rows of a call.
class Task {
 public:
  Task(const Kernels& k, Index all, Index rows) : kernels(kernels_for(k, all)) {
    kernels.enter(rows);
  }
  ~Task() { kernels.leave(); }
  Task(const Task&) = delete;
  Task& operator=(const Task&) = delete;

  const Kernels& kernels;
};

}  // namespace fastdreamer
