// The kernels for amx_emulated; the suffix of this file's name selects its compiler flags
// (setup.py).
#define FD_AMX_EMULATED
#include "cpu/kernels-inl.h"

namespace fastdreamer {
namespace {

constexpr Kernels few = table<FewRows>();

}  // namespace

extern const Kernels amx_emulated_kernels[2] = {table<Fp32>(), table<Amx>(&few)};

}  // namespace fastdreamer
