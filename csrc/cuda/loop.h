// Nested loops of kernel launches, unrolled into one CUDA graph: the H steps of a rollout, its
// backward sweep, the iterations of CEM. fastdreamer/ops/triton/program.py says the same in Python.
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda/graph.h"

namespace fastdreamer {

// stride · (start + step·i), i being the index of the loop at that depth (0 is the outermost);
// with a modulo > 0, stride · ((start + step·i) mod modulo).
struct Term {
  int depth;
  Index stride, start, step, modulo;
};

struct Affine {
  Index base = 0;
  std::vector<Term> terms;
};

struct Argument {
  Kind kind;
  int slot;       // of a pointer
  Affine offset;  // of a pointer, in bytes, or the value of an i32, i64 or u8
  float number;   // of an f32
};

// Described first (slots, begin, launch, end), then replayed. Thread-safe once described.
class Loop {
 public:
  // The sizes in bytes of the tensors that pointers go into.
  Loop(std::shared_ptr<const Device> device, std::vector<Index> slots);

  void begin(Index count);  // opens a loop; a count of 0 leaves its body out
  void end();
  // Throws invalid_argument if an argument does not fit the kernel's parameter, or a pointer would
  // leave its slot in some step.
  void launch(std::shared_ptr<const Kernel> kernel, std::array<unsigned, 3> grid,
              const std::vector<Argument>& arguments);

  // Runs everything on a stream of this device (its handle, 0 being the default one) with the
  // slots at these addresses, which belong to the caller and are to live until the work is done,
  // in stream order. Captures in the first call, later writes new addresses into the nodes that
  // use them; no replay sees an address of an earlier call. Returns how many nodes it wrote, all
  // of them where it captured.
  std::size_t replay(const std::vector<std::uint64_t>& slots, cu::Stream stream);

  // The same launches one by one, for a stream that somebody captures: they become part of that
  // graph, which needs the slots and the kernels for as long as it is replayed. Nothing is loaded.
  void enqueue(const std::vector<std::uint64_t>& slots, cu::Stream stream);

  std::size_t nodes() const { return steps_.size(); }

 private:
  struct Use {  // of a slot by a step
    std::size_t step, value;
    Index offset;
  };
  struct Step {
    const Kernel* kernel;  // its item's
    std::array<unsigned, 3> grid;
    std::size_t first, count;  // its parameters among values_
  };
  struct Item {  // of the description
    enum { begins, ends, launches } what;
    Index count;  // of a loop
    std::shared_ptr<const Kernel> kernel;
    std::array<unsigned, 3> grid;
    std::vector<Argument> arguments;
  };

  void unroll();
  std::size_t unroll_from(std::size_t item, std::vector<Index>& indices);
  void add_step(const Item& item, const std::vector<Index>& indices);
  void expect(const std::vector<std::uint64_t>& slots) const;
  void write_addresses(const std::vector<std::uint64_t>& slots, std::vector<bool>& changed);
  Node node(const Step& step);

  std::shared_ptr<const Device> device_;
  std::vector<Index> slots_;
  std::vector<Item> items_;
  int open_ = 0;  // loops begun and not ended

  std::mutex replaying_;
  bool unrolled_ = false;
  std::vector<Step> steps_;
  std::vector<std::uint64_t> values_;     // 8 bytes a parameter, the value in the first ones
  std::vector<void*> params_;             // params_[i] points to values_[i]
  std::vector<std::vector<Use>> uses_;    // by slot
  std::vector<std::uint64_t> addresses_;  // that every node has; empty if some have others
  Graph graph_;
};

}  // namespace fastdreamer
