// The extension's functions, free of Python and of CUDA's headers. Pointers are device memory of `device`, streams are
// CUDA stream handles of it. Everything throws std::runtime_error with CUDA's message, and nothing waits for the
// device.
#pragma once
#include <cstdint>
#include <string>

namespace gptq {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A quantized weight as tiles.cuh explains it.
struct Weight {
    const uint32_t* words;  // [strips][tiles][32 * bits]
    const void* scales;     // [strips][chunks][16], channels g and g + 8 adjacent
    const uint8_t* zeros;   // as scales; null when all are 2^(bits - 1)
    Dtype scales_dtype;
    int bits;
    int out_features;
    int strips;
    int tiles;
    int chunks;
    int chunk_units;  // chunks * chunk_units = 2 * tiles
};

// y = x W^T + bias. x: [rows][columns] in slot order, columns a multiple of 8 and rows aligned to 16 bytes; slots from
// `columns` on are padding. x and y have the same 16-bit type.
struct Product {
    Weight weight;
    const uint16_t* x;
    int rows;
    int columns;
    const void* bias;  // [out_features] or null
    Dtype bias_dtype;
    uint16_t* y;      // [rows][out_features]
    float* partials;  // [splits][rows][out_features], read and written where splits > 1
};

// How: `skinny_kernel` where strips > 0, else `wide_kernel` (kernels.cuh).
struct Plan {
    int strips;  // of 16 output channels per block: 1 or 2
    int tokens;  // blocks of 8 tokens: 1, 2, 4 or 8
    int warps;   // per block, skinny only
    int splits;  // of the slots over blocks, wide only
};

// Empty, or why this build's machine code does not run on the device.
std::string unfit(int device);

void multiply(int device, const Product& product, Dtype dtype, const Plan& plan, void* stream);

// Output channels [first, first + channels), first a multiple of 16, by slots [0, columns), as `to`
// [channels][columns].
void dequantize(int device, const Weight& weight, int first, int channels, int columns, void* to, Dtype dtype,
                void* stream);

// to[row][slot] = x[row][perm[slot]], zero where perm is not in [0, columns). element_bytes: 2 or 4.
void gather(int device, const void* x, int rows, int columns, int element_bytes, const int32_t* perm, int slots,
            void* to, void* stream);

}  // namespace gptq
