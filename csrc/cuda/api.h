// The part of CUDA's driver API that the loop uses, declared by hand so that neither building nor
// importing needs CUDA. tests/test_cuda_build.py compares every line with NVIDIA's cuda.h.
//
// Enumerations are int here: their size and values are compared. The symbols carry their version
// suffixes; all of them exist since CUDA 12.0, but for the optional one.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUctx_st;
struct CUmod_st;
struct CUfunc_st;
struct CUkern_st;
struct CUstream_st;
struct CUgraph_st;
struct CUgraphNode_st;
struct CUgraphExec_st;

namespace fastdreamer::cu {

using Result = int;
using Device = int;
using Context = CUctx_st*;
using Module = CUmod_st*;
using Function = CUfunc_st*;
using Stream = CUstream_st*;
using Graph = CUgraph_st*;
using Node = CUgraphNode_st*;
using Exec = CUgraphExec_st*;

inline constexpr Result kSuccess = 0;        // CUDA_SUCCESS
inline constexpr Result kInvalidValue = 1;   // CUDA_ERROR_INVALID_VALUE
inline constexpr Result kDeinitialized = 4;  // CUDA_ERROR_DEINITIALIZED: the process is ending

inline constexpr int kComputeCapabilityMajor = 75;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
inline constexpr int kComputeCapabilityMinor = 76;
inline constexpr int kMaxSharedOptin = 97;     // ..._MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
inline constexpr int kFuncMaxShared = 8;       // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
inline constexpr unsigned kNonBlocking = 1;    // CU_STREAM_NON_BLOCKING
inline constexpr int kCaptureThreadLocal = 1;  // CU_STREAM_CAPTURE_MODE_THREAD_LOCAL

// CUDA_KERNEL_NODE_PARAMS_v2
struct KernelNodeParams {
  Function func;
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  void** params;  // one pointer per parameter, to its value; read during the call
  void** extra;
  CUkern_st* kern;
  Context ctx;
};

// X(symbol, arguments); each returns a Result.
#define FASTDREAMER_CUDA_REQUIRED(X)                                                              \
  X(cuInit, (unsigned flags))                                                                     \
  X(cuDriverGetVersion, (int* version))                                                           \
  X(cuGetErrorName, (Result error, const char** text))                                            \
  X(cuGetErrorString, (Result error, const char** text))                                          \
  X(cuDeviceGet, (Device * device, int ordinal))                                                  \
  X(cuDeviceGetCount, (int* count))                                                               \
  X(cuDeviceGetName, (char* name, int length, Device device))                                     \
  X(cuDeviceGetAttribute, (int* value, int attribute, Device device))                             \
  X(cuDevicePrimaryCtxRetain, (Context * context, Device device))                                 \
  X(cuDevicePrimaryCtxRelease_v2, (Device device))                                                \
  X(cuCtxPushCurrent_v2, (Context context))                                                       \
  X(cuCtxPopCurrent_v2, (Context * context))                                                      \
  X(cuCtxSynchronize, ())                                                                         \
  X(cuModuleLoadData, (Module * module, const void* image))                                       \
  X(cuModuleUnload, (Module module))                                                              \
  X(cuModuleGetFunction, (Function * function, Module module, const char* name))                  \
  X(cuFuncSetAttribute, (Function function, int attribute, int value))                            \
  X(cuStreamCreate, (Stream * stream, unsigned flags))                                            \
  X(cuStreamDestroy_v2, (Stream stream))                                                          \
  X(cuStreamBeginCapture_v2, (Stream stream, int mode))                                           \
  X(cuStreamEndCapture, (Stream stream, Graph * graph))                                           \
  X(cuLaunchKernel, (Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z,        \
                     unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes, \
                     Stream stream, void** params, void** extra))                                 \
  X(cuGraphInstantiateWithFlags, (Exec * exec, Graph graph, unsigned long long flags))            \
  X(cuGraphExecKernelNodeSetParams_v2, (Exec exec, Node node, const KernelNodeParams* params))    \
  X(cuGraphLaunch, (Exec exec, Stream stream))                                                    \
  X(cuGraphExecDestroy, (Exec exec))                                                              \
  X(cuGraphDestroy, (Graph graph))

// As the others; but newer headers declare a newer version only, which older drivers lack.
#define FASTDREAMER_CUDA_VERSIONED(X)                                                        \
  X(cuStreamGetCaptureInfo_v2, (Stream stream, int* status, std::uint64_t* id, Graph* graph, \
                                const Node** dependencies, std::size_t* num_dependencies))

// Null where the driver is older than CUDA 12.4.
#define FASTDREAMER_CUDA_OPTIONAL(X) \
  X(cuFuncGetParamInfo,              \
    (Function function, std::size_t index, std::size_t* offset, std::size_t* size))

struct Api {
#define FASTDREAMER_MEMBER(symbol, arguments) Result(*symbol) arguments = nullptr;
  FASTDREAMER_CUDA_REQUIRED(FASTDREAMER_MEMBER)
  FASTDREAMER_CUDA_VERSIONED(FASTDREAMER_MEMBER)
  FASTDREAMER_CUDA_OPTIONAL(FASTDREAMER_MEMBER)
#undef FASTDREAMER_MEMBER
};

}  // namespace fastdreamer::cu
