#pragma once

#include "../python/binding.h"

namespace gptq {

void bind_blocks(PyObject* module);

}  // namespace gptq
