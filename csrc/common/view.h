// Non-owning view of a contiguous row-major matrix. No STL: kernels of every ISA include it.
#pragma once

#include <cstdint>

namespace fastdreamer {

using Index = std::int64_t;

template <class T>
struct Matrix {
  T* data;  // [rows, cols], row-major, contiguous; owned by the caller
  Index rows;
  Index cols;

  // always_inline: an out-of-line copy compiled for one ISA must not be linked into another
  __attribute__((always_inline)) T* row(Index r) const { return data + r * cols; }
};

}  // namespace fastdreamer
