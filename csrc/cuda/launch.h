// The extension's functions, free of Python. Pointers are device memory of `device`, streams are CUDA stream handles of
// it. The kernels for these bits have been loaded there (modules.h). Everything throws std::runtime_error with the
// driver's message, and nothing waits for the device.
#pragma once
#include "arguments.h"

namespace gptq {

// How: `skinny` where strips > 0, else `wide` (device/kernels.cuh).
struct Plan {
    int strips;  // of 16 output channels per block: 1 or 2
    int tokens;  // blocks of 8 tokens: 1, 2, 4 or 8
    int warps;   // per block, skinny only
    int splits;  // of the slots over blocks, wide only
};

void multiply(int device, const Product& product, Dtype dtype, const Plan& plan, void* stream);

// Output channels [first, first + channels), first a multiple of 16, by slots [0, columns), as `to`
// [channels][columns].
void dequantize(int device, const Weight& weight, int first, int channels, int columns, void* to, Dtype dtype,
                void* stream);

// to[row][slot] = x[row][perm[slot]], zero where perm is not in [0, columns). element_bytes: 2 or 4. bits: of any
// kernels that were loaded.
void gather(int device, int bits, const void* x, int rows, int columns, int element_bytes, const int32_t* perm,
            int slots, void* to, void* stream);

}  // namespace gptq
