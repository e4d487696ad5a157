// Computing without the interpreter's lock.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

namespace fastdreamer {

// Gives the lock away as long as it lives.
//
// Where the interpreter ends meanwhile, a daemon thread that asks for the lock again never gets it.
// Python before 3.14 then ends the thread by unwinding its stack, which no destructor lets pass:
// with pybind11's own guard the process aborts. This one stops the thread for good, as Python 3.14
// does: unwound further it would free, without the lock, what belongs to the interpreter.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {  // that unwinding, which has no name in every C++ library
      for (;;) pause();
    }
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace fastdreamer
