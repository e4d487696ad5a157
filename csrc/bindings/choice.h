// The choice of kernels, as Python sees it.
#pragma once

#include <pybind11/pybind11.h>

namespace fastdreamer {

void bind_choice(pybind11::module_& m);

}  // namespace fastdreamer
