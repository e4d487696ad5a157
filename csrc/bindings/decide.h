#pragma once

#include <pybind11/pybind11.h>

namespace fastdreamer {

void bind_decide(pybind11::module_& m);

}  // namespace fastdreamer
