// The tile registers of AMX: eight, of up to 16 rows of 64 bytes, and the product of two that hold
// bfloat16. Where the file that includes this is compiled for AMX.
//
// There are two bodies: the instructions, and with FD_AMX_EMULATED what the instruction set
// reference says of them, so that all that is built on them can be tested on a CPU that has none:
// the order of the sums, roundings, denormals, and that tiles of shapes that do not fit, or without
// a shape, are a fault.
#pragma once

#include "cpu/vec.h"

#if defined(__AMX_BF16__) || defined(FD_AMX_EMULATED)
#  define FD_AMX 1

namespace fastdreamer {
namespace {
namespace amx {

constexpr int kRows = 16, kRowBytes = 64;  // of a whole tile

// What LDTILECFG loads: 64 bytes, by tile the number of rows and of bytes in a row.
struct alignas(64) Shapes {
  std::uint8_t palette, start_row, reserved[14];
  std::uint16_t bytes[16];
  std::uint8_t rows[16];
};
static_assert(sizeof(Shapes) == 64, "as the instruction reads it");

#  if !defined(FD_AMX_EMULATED)

// The compiler knows of no tile, so that these are ordered by being volatile, and against the
// memory that they use by what they clobber.

// Gives the tiles their shapes and makes them zero. Slow: once a task.
FD_INLINE void configure(const Shapes* shapes) { asm volatile("ldtilecfg %0" ::"m"(*shapes)); }
// No tile has a shape any longer, and a switch of threads saves none.
FD_INLINE void release() { asm volatile("tilerelease"); }

template <int tile>
FD_INLINE void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
// Rows that lie `stride` bytes apart.
template <int tile>
FD_INLINE void load(const void* data, Index stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(data), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
FD_INLINE void store(void* data, Index stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(data), "r"(stride), "i"(tile) : "memory");
}
// sum[m, n] += Σ_k a[m, k] b[k, n] of floats; a row of `a` holds 32 bfloat16, one of `b` the two of
// k, k + 1 for 16 n each. Denormals count as zero, and so do those that come out.
template <int sum, int a, int b>
FD_INLINE void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}

#  else

struct Tile {
  alignas(64) unsigned char row[kRows][kRowBytes];
};
struct Registers {
  Shapes shapes;  // palette 0: none have one
  Tile tile[8];
};
thread_local Registers registers;

FD_INLINE void fault_unless(bool good) {
  if (!good) __builtin_trap();
}
FD_INLINE const Shapes& shapes_of(int tile) {
  const Shapes& shapes = registers.shapes;
  fault_unless(shapes.palette == 1 && shapes.rows[tile] > 0 && shapes.bytes[tile] > 0);
  return shapes;
}

FD_INLINE void configure(const Shapes* shapes) {
  registers = Registers{};
  registers.shapes = *shapes;
  fault_unless(shapes->palette == 1);  // of eight tiles
  for (int tile = 0; tile < 16; ++tile) {
    const int rows = shapes->rows[tile], bytes = shapes->bytes[tile];
    fault_unless(tile < 8 ? rows <= kRows && bytes <= kRowBytes : rows == 0 && bytes == 0);
  }
}
FD_INLINE void release() { registers = Registers{}; }

template <int tile>
FD_INLINE void zero() {
  shapes_of(tile);
  registers.tile[tile] = Tile{};
}
template <int tile>
FD_INLINE void load(const void* data, Index stride) {
  const Shapes& shapes = shapes_of(tile);
  Tile& to = registers.tile[tile];
  const char* from = static_cast<const char*>(data);
  to = Tile{};
  for (int r = 0; r < shapes.rows[tile]; ++r) {
    __builtin_memcpy(to.row[r], from + r * stride, shapes.bytes[tile]);
  }
}
template <int tile>
FD_INLINE void store(void* data, Index stride) {
  const Shapes& shapes = shapes_of(tile);
  char* to = static_cast<char*>(data);
  for (int r = 0; r < shapes.rows[tile]; ++r) {
    __builtin_memcpy(to + r * stride, registers.tile[tile].row[r], shapes.bytes[tile]);
  }
}

// Per element the products of even and of odd k are summed apart, each fused; then one is added to
// the other, and both to the sum before. noinline: in whole behind the change of MXCSR.
__attribute__((noinline)) void multiply_rows(Tile& sum, const Tile& a, const Tile& b, int rows,
                                             int pairs) {
  const Words upper = word_fill(0xffff0000u);
  Vec even[kRows], odd[kRows];  // of b, by pairs of k
  for (int k = 0; k < pairs; ++k) {
    const Words w = word_load(b.row[k]);
    even[k] = floats(up16(w));
    odd[k] = floats(w & upper);
  }
  for (int m = 0; m < rows; ++m) {
    Vec low = fill(0.0f), high = low;
    for (int k = 0; k < pairs; ++k) {
      std::uint32_t word;
      __builtin_memcpy(&word, a.row[m] + 4 * k, 4);
      low = fma(floats(up16(word_fill(word))), even[k], low);
      high = fma(floats(word_fill(word) & upper), odd[k], high);
    }
    float* to = reinterpret_cast<float*>(sum.row[m]);
    fastdreamer::store(to, fastdreamer::load(to) + (low + high));
  }
}

template <int sum, int a, int b>
FD_INLINE void multiply() {
  const Shapes& shapes = shapes_of(sum);
  fault_unless(&shapes_of(a) == &shapes_of(b) && sum != a && sum != b && a != b);
  fault_unless(shapes.rows[sum] == shapes.rows[a] && shapes.bytes[sum] == shapes.bytes[b] &&
               shapes.bytes[a] == 4 * shapes.rows[b]);
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x9fc0);  // to nearest even, denormals to zero in and out, no exceptions
  multiply_rows(registers.tile[sum], registers.tile[a], registers.tile[b], shapes.rows[sum],
                shapes.rows[b]);
  _mm_setcsr(before);
}

#  endif

}  // namespace amx
}  // namespace
}  // namespace fastdreamer
#endif
