// Rows of the dense weight [out_features][in_features], looked up by number: what an embedding of tokens is.
#pragma once

#include <cstdint>

#include "kernel.h"

namespace gptq {

struct LookupCall {
    Weight weight;
    const int64_t* ids;  // [rows], output channels
    int rows;
    void* y;  // [rows][in_features] of dtype
    Dtype dtype;
};

// Throws std::out_of_range for an id that is no output channel; nothing was written then.
void look_up(const LookupCall& call, int threads);

}  // namespace gptq
