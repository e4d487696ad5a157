#include "cpu/parallel.h"

#if defined(__unix__) || defined(__APPLE__)
#  include <pthread.h>
#endif

namespace fastdreamer {
namespace {

bool forked = false;

#if defined(__unix__) || defined(__APPLE__)
const int registered = pthread_atfork(nullptr, nullptr, note_fork);
#endif

}  // namespace

void note_fork() { forked = true; }

int usable_threads(int threads) { return forked ? 1 : threads; }

}  // namespace fastdreamer
