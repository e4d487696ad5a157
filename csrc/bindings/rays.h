// Pictures by rays, as Python makes them.
#pragma once

#include <pybind11/pybind11.h>

namespace fastdreamer {

void bind_rays(pybind11::module_& m);

}  // namespace fastdreamer
