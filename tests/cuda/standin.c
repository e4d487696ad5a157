/* A libcuda that runs nothing: it records launches, and runs them by a callback into the test.
 *
 * It is compiled against NVIDIA's own cuda.h (the one in Triton's wheel), so that what it exports
 * is what NVIDIA declares. What a driver refuses it refuses, too: handles that were freed, calls
 * without a context, nodes of another graph, more shared memory than was asked for. A function's
 * parameters are read from the cubin, where ptxas wrote them.
 *
 * For the tests: every call is counted and the n-th can be made to fail; live objects are counted
 * by kind; faults can be seeded (see `fault`).
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <elf.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_PARAMS 64
#define MAX_BYTES 384
#define MAX_CALLS 65536

enum { CONTEXT, MODULE, STREAM, GRAPH, EXEC, KINDS };

struct function {
  struct CUmod_st* module;
  char name[256];
  int params;
  size_t offset[MAX_PARAMS], size[MAX_PARAMS];
  int max_shared;
  struct function* next;
};
struct CUmod_st {
  int kind;
  uint64_t identity;
  const char* image; /* a copy */
  size_t bytes;
  struct function* functions;
};
struct node {
  struct function* function;
  unsigned grid[3], block[3], shared;
  unsigned char values[MAX_BYTES];
  size_t bytes;
  size_t index; /* in its graph */
};
struct CUgraph_st {
  int kind;
  struct node** nodes; /* handles of the driver's CUgraphNode are these pointers */
  size_t count, room;
};
struct CUgraphExec_st {
  int kind;
  struct CUgraph_st* graph; /* of which handles are taken */
  struct node* nodes;       /* copies */
  size_t count;
};
struct CUstream_st {
  int kind;
  struct CUgraph_st* capturing;
  CUgraphNode last;
};

typedef void (*run_t)(uint64_t identity, const char* name, const unsigned* grid,
                      const unsigned* block, unsigned shared, const unsigned char* values,
                      size_t bytes, void* stream);

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static run_t run;
static long live[KINDS];
static long calls, fail_at = -1;
static CUresult fail_with;
static const char* names[MAX_CALLS];
static int initialised;
static __thread CUcontext stack[16];
static __thread int depth;
static int primary;          /* its retain count */
static int primary_object;   /* its address is the handle */
static int driver_version = 12080;
static int device_count = 1;
static int capability = 90;
static int fault, fault_at;
static int capturing; /* somebody else, in the mode that forbids everybody what is unsafe */

/* Faults, each as if the loop or the driver had it; fault_at is the node that is hit. */
enum {
  NO_FAULT,
  DROP_NODE,       /* a launch is not captured (the node does nothing) */
  REVERSE_ORDER,   /* nodes run last to first */
  STALE_POINTERS,  /* writing new parameters into a node does nothing */
  WRONG_BLOCK,     /* twice the threads */
  WRONG_SHARED,    /* 16 bytes fewer, or 16 where there are none */
  WRONG_SCALAR,    /* the first 4-byte value is one more */
  SWAP_POINTERS,   /* the first two pointers change places */
  SHORT_GRID,      /* one block fewer along the longest axis, or none */
  REPEAT_NODE,     /* runs twice */
  SHIFT_POINTER,   /* the first pointer is 4 bytes further */
  HIDDEN_POINTER,  /* the last hidden pointer is not null */
};

EXPORT void standin_run(run_t callback) { run = callback; }
EXPORT long standin_live(int kind) { return live[kind]; }
EXPORT long standin_calls(void) { return calls; }
EXPORT const char* standin_call(long i) { return names[i % MAX_CALLS]; }
EXPORT void standin_fail(long at, int error) {
  fail_at = at < 0 ? -1 : calls + at;
  fail_with = error;
}
EXPORT void standin_fault(int which, int at) {
  fault = which;
  fault_at = at;
}
EXPORT void standin_device(int version, int count, int sm) {
  driver_version = version;
  device_count = count;
  capability = sm;
}
EXPORT void standin_capturing(int on) { capturing = on; }
EXPORT long standin_context_depth(void) { return depth; }

/* Counts the call; an injected failure is the result, after the work where something is freed. */
static CUresult enter(const char* name) {
  pthread_mutex_lock(&lock);
  CUresult result = CUDA_SUCCESS;
  names[calls % MAX_CALLS] = name;
  if (calls++ == fail_at) result = fail_with;
  pthread_mutex_unlock(&lock);
  return result;
}
#define ENTER()                                                 \
  do {                                                          \
    CUresult injected = enter(__func__);                        \
    if (injected != CUDA_SUCCESS) return injected;              \
    if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;        \
  } while (0)
#define NEED_CONTEXT() \
  if (depth == 0) return CUDA_ERROR_INVALID_CONTEXT
#define NEED(handle, of) \
  if ((handle) == NULL || (handle)->kind != (of) + 1000) return CUDA_ERROR_INVALID_HANDLE

static void add(int kind, long by) {
  pthread_mutex_lock(&lock);
  live[kind] += by;
  pthread_mutex_unlock(&lock);
}

/* ---------------------------------------------------------------- the cubin */

static const Elf64_Shdr* sections(const char* image, int* count) {
  const Elf64_Ehdr* head = (const Elf64_Ehdr*)image;
  if (memcmp(head->e_ident, ELFMAG, SELFMAG) != 0) return NULL;
  *count = head->e_shnum;
  return (const Elf64_Shdr*)(image + head->e_shoff);
}

static size_t image_bytes(const char* image) {
  int count;
  const Elf64_Shdr* s = sections(image, &count);
  if (s == NULL) return 0;
  const Elf64_Ehdr* head = (const Elf64_Ehdr*)image;
  size_t end = head->e_shoff + (size_t)count * head->e_shentsize;
  size_t programs = head->e_phoff + (size_t)head->e_phnum * head->e_phentsize;
  if (programs > end) end = programs;
  for (int i = 0; i < count; ++i) {
    size_t here = s[i].sh_type == SHT_NOBITS ? 0 : s[i].sh_offset + s[i].sh_size;
    if (here > end) end = here;
  }
  return end;
}

/* Tells images apart (FNV-1a). */
EXPORT uint64_t standin_identity(const char* image) {
  uint64_t hash = 14695981039346656037ULL;
  size_t bytes = image_bytes(image);
  for (size_t i = 0; i < bytes; ++i) hash = (hash ^ (unsigned char)image[i]) * 1099511628211ULL;
  return hash;
}

static const Elf64_Shdr* find(const char* image, const char* prefix, const char* name) {
  int count = 0;
  const Elf64_Shdr* s = sections(image, &count);
  const char* strings = image + s[((const Elf64_Ehdr*)image)->e_shstrndx].sh_offset;
  for (int i = 0; i < count; ++i) {
    const char* section = strings + s[i].sh_name;
    size_t n = strlen(prefix);
    if (strncmp(section, prefix, n) == 0 && strcmp(section + n, name) == 0) return &s[i];
  }
  return NULL;
}

/* EIATTR_KPARAM_INFO entries: index, ordinal, offset, size << 18 | ... */
static void read_params(struct function* f) {
  const Elf64_Shdr* info = find(f->module->image, ".nv.info.", f->name);
  if (info == NULL) return;
  const unsigned char* at = (const unsigned char*)f->module->image + info->sh_offset;
  const unsigned char* end = at + info->sh_size;
  while (at + 4 <= end) {
    unsigned format = at[0], attribute = at[1];
    uint16_t size;
    memcpy(&size, at + 2, 2);
    if (format != 4) { /* the value is in the entry itself */
      at += 4;
      continue;
    }
    if (attribute == 0x17 || attribute == 0x45) {
      uint16_t ordinal, offset;
      uint32_t packed;
      memcpy(&ordinal, at + 8, 2);
      memcpy(&offset, at + 10, 2);
      memcpy(&packed, at + 12, 4);
      if (ordinal < MAX_PARAMS) {
        f->offset[ordinal] = offset;
        f->size[ordinal] = packed >> 18;
        if (ordinal + 1 > f->params) f->params = ordinal + 1;
      }
    }
    at += 4 + size;
  }
}

/* ---------------------------------------------------------------- the driver */

EXPORT CUresult CUDAAPI cuInit(unsigned int flags) {
  CUresult injected = enter(__func__);
  if (injected != CUDA_SUCCESS) return injected;
  initialised = flags == 0;
  return flags == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
EXPORT CUresult CUDAAPI cuDriverGetVersion(int* version) {
  CUresult injected = enter(__func__);
  if (injected != CUDA_SUCCESS) return injected;
  *version = driver_version;
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuGetErrorName(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_OUT_OF_MEMORY    ? "CUDA_ERROR_OUT_OF_MEMORY"
          : error == CUDA_ERROR_INVALID_HANDLE ? "CUDA_ERROR_INVALID_HANDLE"
          : error == CUDA_ERROR_INVALID_VALUE  ? "CUDA_ERROR_INVALID_VALUE"
          : error == CUDA_ERROR_NOT_FOUND      ? "CUDA_ERROR_NOT_FOUND"
          : error == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
                                               : "CUDA_ERROR_UNKNOWN";
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "some other error";
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuDeviceGet(CUdevice* device, int ordinal) {
  ENTER();
  if (ordinal < 0 || ordinal >= device_count) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuDeviceGetCount(int* count) {
  ENTER();
  *count = device_count;
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuDeviceGetName(char* name, int length, CUdevice device) {
  ENTER();
  (void)device;
  strncpy(name, "stand-in", (size_t)length);
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuDeviceGetAttribute(int* value, CUdevice_attribute which,
                                             CUdevice device) {
  ENTER();
  (void)device;
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = capability / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = capability % 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 99 * 1024; break;
    default: *value = 32;
  }
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  ENTER();
  (void)device;
  add(CONTEXT, 1);
  ++primary;
  *context = (CUcontext)&primary_object;
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  CUresult injected = enter(__func__);
  (void)device;
  if (primary == 0) return CUDA_ERROR_INVALID_CONTEXT;
  --primary;
  add(CONTEXT, -1);
  return injected;
}
EXPORT CUresult CUDAAPI cuCtxPushCurrent_v2(CUcontext context) {
  ENTER();
  if (context != (CUcontext)&primary_object || primary == 0) return CUDA_ERROR_INVALID_CONTEXT;
  if (depth == 16) return CUDA_ERROR_OUT_OF_MEMORY;
  stack[depth++] = context;
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuCtxPopCurrent_v2(CUcontext* context) {
  CUresult injected = enter(__func__);
  NEED_CONTEXT();
  *context = stack[--depth];
  return injected;
}
EXPORT CUresult CUDAAPI cuCtxSynchronize(void) {
  CUresult injected = enter(__func__);
  NEED_CONTEXT();
  return capturing ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : injected;
}
EXPORT CUresult CUDAAPI cuModuleLoadData(CUmodule* module, const void* image) {
  ENTER();
  NEED_CONTEXT();
  if (capturing) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  size_t bytes = image_bytes(image);
  if (bytes == 0) return CUDA_ERROR_INVALID_IMAGE;
  *module = calloc(1, sizeof(**module));
  char* copy = malloc(bytes);
  memcpy(copy, image, bytes);
  **module = (struct CUmod_st){MODULE + 1000, standin_identity(image), copy, bytes, NULL};
  add(MODULE, 1);
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuModuleUnload(CUmodule module) {
  CUresult injected = enter(__func__);
  NEED_CONTEXT();
  NEED(module, MODULE);
  module->kind = 0; /* what else it holds stays: late launches of it are to be seen, not crash */
  add(MODULE, -1);
  return injected;
}
EXPORT CUresult CUDAAPI cuModuleGetFunction(CUfunction* function, CUmodule module,
                                            const char* name) {
  ENTER();
  NEED_CONTEXT();
  NEED(module, MODULE);
  if (find(module->image, ".text.", name) == NULL) return CUDA_ERROR_NOT_FOUND;
  struct function* made = calloc(1, sizeof(*made));
  made->module = module;
  made->max_shared = 48 * 1024;
  strncpy(made->name, name, sizeof(made->name) - 1);
  read_params(made);
  made->next = module->functions;
  module->functions = made;
  *function = (CUfunction)made;
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuFuncSetAttribute(CUfunction function, CUfunction_attribute which,
                                           int value) {
  ENTER();
  NEED_CONTEXT();
  struct function* f = (struct function*)function;
  NEED(f->module, MODULE);
  if (which != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
  if (value > 99 * 1024) return CUDA_ERROR_INVALID_VALUE;
  f->max_shared = value;
  return CUDA_SUCCESS;
}
#ifndef WITHOUT_PARAM_INFO
EXPORT CUresult CUDAAPI cuFuncGetParamInfo(CUfunction function, size_t index, size_t* offset,
                                           size_t* size) {
  ENTER();
  NEED_CONTEXT();
  struct function* f = (struct function*)function;
  NEED(f->module, MODULE);
  if (index >= (size_t)f->params) return CUDA_ERROR_INVALID_VALUE;
  *offset = f->offset[index];
  if (size != NULL) *size = f->size[index];
  return CUDA_SUCCESS;
}
#endif

static CUgraph new_graph(void) {
  CUgraph graph = calloc(1, sizeof(*graph));
  graph->kind = GRAPH + 1000;
  add(GRAPH, 1);
  return graph;
}
static void free_graph(CUgraph graph) {
  graph->kind = 0; /* nodes stay allocated: a stale handle is to be refused, not to crash */
  add(GRAPH, -1);
}

EXPORT CUresult CUDAAPI cuStreamCreate(CUstream* stream, unsigned int flags) {
  ENTER();
  NEED_CONTEXT();
  (void)flags;
  *stream = calloc(1, sizeof(**stream));
  (*stream)->kind = STREAM + 1000;
  add(STREAM, 1);
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuStreamDestroy_v2(CUstream stream) {
  CUresult injected = enter(__func__);
  NEED(stream, STREAM);
  if (stream->capturing != NULL) free_graph(stream->capturing);
  stream->kind = 0;
  add(STREAM, -1);
  return injected;
}
EXPORT CUresult CUDAAPI cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode mode) {
  ENTER();
  NEED_CONTEXT();
  NEED(stream, STREAM);
  if (mode != CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) return CUDA_ERROR_INVALID_VALUE;
  if (stream->capturing != NULL) return CUDA_ERROR_ILLEGAL_STATE;
  stream->capturing = new_graph();
  stream->last = NULL;
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuStreamEndCapture(CUstream stream, CUgraph* graph) {
  ENTER();
  NEED_CONTEXT();
  NEED(stream, STREAM);
  if (stream->capturing == NULL) return CUDA_ERROR_ILLEGAL_STATE;
  *graph = stream->capturing;
  stream->capturing = NULL;
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuStreamGetCaptureInfo_v2(CUstream stream, CUstreamCaptureStatus* status,
                                                  cuuint64_t* id, CUgraph* graph,
                                                  const CUgraphNode** dependencies,
                                                  size_t* count) {
  ENTER();
  NEED_CONTEXT();
  NEED(stream, STREAM);
  *status = stream->capturing == NULL ? CU_STREAM_CAPTURE_STATUS_NONE
                                      : CU_STREAM_CAPTURE_STATUS_ACTIVE;
  if (id != NULL) *id = 1;
  if (graph != NULL) *graph = stream->capturing;
  if (dependencies != NULL) *dependencies = &stream->last;
  if (count != NULL) *count = stream->last == NULL ? 0 : 1;
  return CUDA_SUCCESS;
}

static CUresult fill(struct node* node, struct function* f, const unsigned* grid,
                     const unsigned* block, unsigned shared, void** params) {
  NEED(f->module, MODULE);
  for (int d = 0; d < 3; ++d) {
    if (grid[d] == 0 || block[d] == 0) return CUDA_ERROR_INVALID_VALUE;
    node->grid[d] = grid[d];
    node->block[d] = block[d];
  }
  if ((int)shared > f->max_shared) return CUDA_ERROR_INVALID_VALUE;
  node->function = f;
  node->shared = shared;
  node->bytes = f->params == 0 ? 0 : f->offset[f->params - 1] + f->size[f->params - 1];
  memset(node->values, 0, node->bytes);
  for (int i = 0; i < f->params; ++i) {
    memcpy(node->values + f->offset[i], params[i], f->size[i]);
  }
  return CUDA_SUCCESS;
}

static void seed(struct node* node) {
  struct function* f = node->function;
  int pointers[MAX_PARAMS], count = 0, hidden[2] = {-1, -1}, scalar = -1;
  for (int i = 0; i < f->params; ++i) {
    uint64_t value = 0;
    memcpy(&value, node->values + f->offset[i], f->size[i]);
    if (f->size[i] == 8 && value != 0) pointers[count++] = i;
    if (f->size[i] == 8 && value == 0) hidden[1] = i;
    if (f->size[i] == 4 && scalar < 0) scalar = i;
  }
  unsigned char* values = node->values;
  if (fault == SWAP_POINTERS && count > 1) {
    unsigned char kept[8];
    memcpy(kept, values + f->offset[pointers[0]], 8);
    memcpy(values + f->offset[pointers[0]], values + f->offset[pointers[1]], 8);
    memcpy(values + f->offset[pointers[1]], kept, 8);
  }
  if (fault == SHIFT_POINTER && count > 0) {
    uint64_t value;
    memcpy(&value, values + f->offset[pointers[0]], 8);
    value += 4;
    memcpy(values + f->offset[pointers[0]], &value, 8);
  }
  if (fault == HIDDEN_POINTER && hidden[1] >= 0) values[f->offset[hidden[1]]] = 64;
  if (fault == WRONG_SCALAR && scalar >= 0) values[f->offset[scalar]] += 1;
  if (fault == WRONG_BLOCK) node->block[0] *= 2;
  if (fault == WRONG_SHARED) node->shared = node->shared >= 16 ? node->shared - 16 : 16;
}

static void run_node(const struct node* given, int index, void* stream) {
  struct node node = *given;
  int hit = fault != NO_FAULT && index == fault_at;
  if (hit && fault == DROP_NODE) return;
  if (hit) seed(&node);
  if (hit && fault == SHORT_GRID) {
    int longest = 0;
    for (int d = 1; d < 3; ++d) longest = node.grid[d] > node.grid[longest] ? d : longest;
    if (--node.grid[longest] == 0) return;
  }
  if (run == NULL) return;
  for (int times = hit && fault == REPEAT_NODE ? 2 : 1; times > 0; --times) {
    run(node.function->module->identity, node.function->name, node.grid, node.block, node.shared,
        node.values, node.bytes, stream);
  }
}

EXPORT CUresult CUDAAPI cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz,
                                       unsigned bx, unsigned by, unsigned bz, unsigned shared,
                                       CUstream stream, void** params, void** extra) {
  ENTER();
  NEED_CONTEXT();
  const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
  if (extra != NULL) return CUDA_ERROR_INVALID_VALUE;
  if (stream == NULL || stream->capturing == NULL) {
    struct node made;
    CUresult result = fill(&made, (struct function*)function, grid, block, shared, params);
    if (result == CUDA_SUCCESS) run_node(&made, -1, stream);
    return result;
  }
  NEED(stream, STREAM);
  CUgraph graph = stream->capturing;
  if (graph->count == graph->room) {
    graph->room = graph->room == 0 ? 64 : 2 * graph->room;
    graph->nodes = realloc(graph->nodes, graph->room * sizeof(*graph->nodes));
  }
  struct node* node = malloc(sizeof(*node));
  CUresult result = fill(node, (struct function*)function, grid, block, shared, params);
  if (result != CUDA_SUCCESS) {
    free(node);
    return result;
  }
  node->index = graph->count;
  graph->nodes[graph->count++] = node;
  stream->last = (CUgraphNode)node;
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function,
                                         void** params, void** extra) {
  if (config->numAttrs != 0) return CUDA_ERROR_INVALID_VALUE; /* none is expected */
  return cuLaunchKernel(function, config->gridDimX, config->gridDimY, config->gridDimZ,
                        config->blockDimX, config->blockDimY, config->blockDimZ,
                        config->sharedMemBytes, config->hStream, params, extra);
}
#undef cuGraphInstantiateWithFlags
EXPORT CUresult CUDAAPI cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph graph,
                                                    unsigned long long flags) {
  ENTER();
  NEED_CONTEXT();
  NEED(graph, GRAPH);
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  *exec = calloc(1, sizeof(**exec));
  (*exec)->kind = EXEC + 1000;
  (*exec)->graph = graph;
  (*exec)->count = graph->count;
  (*exec)->nodes = malloc(graph->count * sizeof(struct node));
  for (size_t i = 0; i < graph->count; ++i) (*exec)->nodes[i] = *graph->nodes[i];
  add(EXEC, 1);
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuGraphExecKernelNodeSetParams_v2(
    CUgraphExec exec, CUgraphNode handle, const CUDA_KERNEL_NODE_PARAMS_v2* params) {
  ENTER();
  NEED_CONTEXT();
  NEED(exec, EXEC);
  NEED(exec->graph, GRAPH);
  const size_t i = ((struct node*)handle)->index;
  if (i >= exec->count || (CUgraphNode)exec->graph->nodes[i] != handle) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (fault == STALE_POINTERS) return CUDA_SUCCESS;
  if (params->func != (CUfunction)exec->nodes[i].function) return CUDA_ERROR_INVALID_VALUE;
  const unsigned grid[3] = {params->gridDimX, params->gridDimY, params->gridDimZ};
  const unsigned block[3] = {params->blockDimX, params->blockDimY, params->blockDimZ};
  return fill(&exec->nodes[i], (struct function*)params->func, grid, block,
              params->sharedMemBytes, params->kernelParams);
}
EXPORT CUresult CUDAAPI cuGraphLaunch(CUgraphExec exec, CUstream stream) {
  ENTER();
  NEED_CONTEXT();
  NEED(exec, EXEC);
  for (size_t n = 0; n < exec->count; ++n) {
    size_t i = fault == REVERSE_ORDER ? exec->count - 1 - n : n;
    run_node(&exec->nodes[i], (int)i, stream);
  }
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuGraphExecDestroy(CUgraphExec exec) {
  CUresult injected = enter(__func__);
  NEED(exec, EXEC);
  exec->kind = 0;
  free(exec->nodes);
  add(EXEC, -1);
  return injected;
}
EXPORT CUresult CUDAAPI cuGraphDestroy(CUgraph graph) {
  CUresult injected = enter(__func__);
  NEED(graph, GRAPH);
  free_graph(graph);
  return injected;
}

/* ---------------------------------------------------------------- what Triton's launcher calls */

EXPORT CUresult CUDAAPI cuCtxGetCurrent(CUcontext* context) {
  *context = depth == 0 ? NULL : stack[depth - 1];
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuCtxSetCurrent(CUcontext context) {
  if (depth == 0) depth = 1;
  stack[depth - 1] = context;
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuFuncGetAttribute(int* value, CUfunction_attribute which,
                                           CUfunction function) {
  (void)function;
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  (void)function;
  (void)config;
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuPointerGetAttribute(void* data, CUpointer_attribute attribute,
                                              CUdeviceptr pointer) {
  (void)attribute;
  memcpy(data, &pointer, sizeof(pointer));
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuCtxGetLimit(size_t* value, CUlimit limit) {
  (void)limit;
  *value = 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuCtxSetLimit(CUlimit limit, size_t value) {
  (void)limit;
  (void)value;
  return CUDA_SUCCESS;
}
EXPORT CUresult CUDAAPI cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  *status = stream != NULL && stream->capturing != NULL ? CU_STREAM_CAPTURE_STATUS_ACTIVE
                                                        : CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
