// Products with weights that are not quantized, for rows so few that reading the weight takes the time.
#pragma once

#include "block.h"

namespace gptq {

// y [rows][outputs] of `to` = x times the transpose of the weight, and its bias. shape: of x.
void multiply(const Dense&, const Rows& shape, const void* x, Dtype to, void* y, int threads);

}  // namespace gptq
