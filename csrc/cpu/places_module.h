#pragma once

#include <pybind11/pybind11.h>

namespace gptq {

void bind_places(pybind11::module_&);

}  // namespace gptq
