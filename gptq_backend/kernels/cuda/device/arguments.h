// What the host (csrc/cuda) and the kernels agree on: their arguments, and the blocks that they are made for. It
// includes no header under NVRTC, which has none.
#pragma once
#ifdef __CUDACC_RTC__
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;
#else
#include <cstdint>
#endif

#ifdef __CUDACC__
#define BOTH __host__ __device__
#else
#define BOTH
#endif

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

constexpr int kStrip = 16;  // output channels
constexpr int kTile = 64;   // slots
constexpr int kUnit = 32;

// Of a block of the wide kernel: 4 warps share its strips, times 2 that take a half of each stage.
constexpr int kWideWarps = 8;
constexpr int kWideStrips = 8;
constexpr int kStageTiles = 4;

// Shared memory of a stage: activations, then words.
BOTH constexpr int wide_stage_bytes(int bits, int tokens) {
    return tokens * 8 * kStageTiles * kTile * 2 + bits * kWideStrips * kStageTiles * kTile * kStrip / 8;
}

// What every architecture with asynchronous copies lets a block have; and 7.5, which has none.
constexpr int kSharedBytes = 99 * 1024, kTuringSharedBytes = 64 * 1024;

// As many as fit, but at least 2 and at most 4: in both of the above alike, on whatever has more.
BOTH constexpr int wide_stages(int bits, int tokens, int shared_bytes) {
    const int usable = shared_bytes < kSharedBytes ? kTuringSharedBytes : kSharedBytes;
    const int fitting = usable / wide_stage_bytes(bits, tokens);
    return fitting < 2 ? 2 : fitting > 4 ? 4 : fitting;
}

}  // namespace gptq
