// Compiled, never run: csrc/cuda/api.h says what NVIDIA's cuda.h says. An argument of ours may be
// an int where theirs is an enumeration of that size; everything else is the same type, but for the
// struct, whose layout is compared.
#include <cuda.h>

#include <cstddef>
#include <type_traits>

#include "cuda/api.h"

namespace ours = fastdreamer::cu;

template <class Theirs, class Ours>
constexpr bool same() {
  using T = std::remove_cv_t<Theirs>;
  using O = std::remove_cv_t<Ours>;
  if constexpr (std::is_const_v<Theirs> != std::is_const_v<Ours>) return false;
  if constexpr (std::is_same_v<T, O>)
    return true;
  else if constexpr (std::is_enum_v<T>)
    return std::is_same_v<O, int> && sizeof(T) == sizeof(O);
  else if constexpr (std::is_same_v<T, CUDA_KERNEL_NODE_PARAMS_v2>) {
    return std::is_same_v<O, ours::KernelNodeParams>;
  } else if constexpr (std::is_pointer_v<T> && std::is_pointer_v<O>) {
    return same<std::remove_pointer_t<T>, std::remove_pointer_t<O>>();
  } else if constexpr (std::is_integral_v<T> && std::is_integral_v<O>) {
    return sizeof(T) == sizeof(O) && std::is_signed_v<T> == std::is_signed_v<O>;  // cuuint64_t
  } else
    return false;
}

template <class Theirs, class Ours>
struct Match : std::false_type {};
template <class R, class... T, class Q, class... O>
struct Match<R (*)(T...), Q (*)(O...)> {
  template <std::size_t N = sizeof...(T)>
  static constexpr bool all() {
    if constexpr (N != sizeof...(O))
      return false;
    else
      return (same<T, O>() && ...);
  }
  static constexpr bool value = same<R, Q>() && all();
};

#define CHECK(symbol, arguments)                                                \
  static_assert(Match<decltype(&::symbol), decltype(ours::Api::symbol)>::value, \
                #symbol " is declared otherwise in cuda.h");
#ifdef __CUDA_API_VERSION_INTERNAL  // the header then declares every version, and renames nothing
FASTDREAMER_CUDA_VERSIONED(CHECK)
#else
FASTDREAMER_CUDA_REQUIRED(CHECK)
FASTDREAMER_CUDA_OPTIONAL(CHECK)
#endif

static_assert(ours::kSuccess == CUDA_SUCCESS);
static_assert(ours::kInvalidValue == CUDA_ERROR_INVALID_VALUE);
static_assert(ours::kDeinitialized == CUDA_ERROR_DEINITIALIZED);
static_assert(ours::kComputeCapabilityMajor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
static_assert(ours::kComputeCapabilityMinor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
static_assert(ours::kMaxSharedOptin == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
static_assert(ours::kFuncMaxShared == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
static_assert(ours::kNonBlocking == CU_STREAM_NON_BLOCKING);
static_assert(ours::kCaptureThreadLocal == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);

#define FIELD(mine, theirs, count)                                                              \
  static_assert(                                                                                \
      offsetof(ours::KernelNodeParams, mine) == offsetof(CUDA_KERNEL_NODE_PARAMS_v2, theirs) && \
      sizeof(ours::KernelNodeParams::mine) == count * sizeof(CUDA_KERNEL_NODE_PARAMS_v2::theirs))
static_assert(sizeof(ours::KernelNodeParams) == sizeof(CUDA_KERNEL_NODE_PARAMS_v2));
FIELD(func, func, 1);
FIELD(grid, gridDimX, 3);
FIELD(block, blockDimX, 3);
FIELD(shared_bytes, sharedMemBytes, 1);
FIELD(params, kernelParams, 1);
FIELD(extra, extra, 1);
FIELD(kern, kern, 1);
FIELD(ctx, ctx, 1);
