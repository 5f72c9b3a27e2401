#pragma once

#include "../python/binding.h"

namespace gptq {

void bind_places(PyObject* module);

}  // namespace gptq
