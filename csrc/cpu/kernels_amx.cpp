// The kernels for amx; the suffix of this file's name selects its compiler flags (setup.py).
#include "cpu/kernels-inl.h"

namespace fastdreamer {
namespace {

constexpr Kernels few = table<FewRows>();

}  // namespace

extern const Kernels amx_kernels[2] = {table<Fp32>(), table<Amx>(&few)};

}  // namespace fastdreamer
