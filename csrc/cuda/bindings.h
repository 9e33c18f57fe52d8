// The functions of the CUDA backend, for the module _native and for the emulation's module.
#pragma once

#include <pybind11/pybind11.h>

namespace oprd {

void bind_cuda(pybind11::module_& m);

}  // namespace oprd
