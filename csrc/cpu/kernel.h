// What the driver (gemm.cpp) and the per-ISA units (level_*.cpp) share. docs/kernels.md draws the layout.
//
// The per-ISA units are compiled with flags that the running CPU may lack. They therefore include no header with inline
// functions: the linker could keep their copy of such a function for the whole library.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gptq {

constexpr int kStrip = 16;      // output channels side by side in one vector
constexpr int kMaxBlock = 128;  // input channels that share one activation scale, at most: int32 sums cannot overflow

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

// A repacked weight. "Slots" are input channels sorted by group and padded; blocks cut them so that a block lies in
// one group.
struct Weight {
    const uint32_t* words;  // [strips][slots * bits / 32][16]
    const void* scales;     // [strips][groups][16]
    const uint8_t* zeros;   // [strips][groups][16], or null: 2^(bits-1) everywhere
    const int32_t* perm;    // [slots] input channel of each slot, -1 for padding; null: slot = channel
    const int32_t* blocks;  // [n_blocks][3] first slot, end slot, group
    Dtype scales_dtype;
    int bits, in_features, out_features, slots, groups, n_blocks;

    int strips() const { return (out_features + kStrip - 1) / kStrip; }
};

// One product y = x @ W.T + bias. Activations become integers with a scale per row and block: int16, or int8 (a8).
// fp32 rows take two int16 "planes" (x = hi + lo), which behave as two rows until the very end.
struct Call {
    Weight weight;
    const void* x;          // [rows][in_features] of dtype
    const int32_t* x_rows;  // [rows] which row of x each is, or null: as they come
    const int32_t* y_rows;  // likewise of y
    Dtype dtype;
    int rows;
    const void* bias;  // [out_features] of bias_dtype, or null
    Dtype bias_dtype;
    void* y;  // [rows][out_features] of dtype
    bool a8;
    int planes;
    uint32_t* lanes;  // [rows * planes][lane_stride()], integers in the order the codes unpack
    float* x_scales;  // [rows * planes][n_blocks]
    int32_t* x_sums;  // [rows * planes][n_blocks], of the integers

    // A cache line more than needed: at a distance of 2^n bytes the rows would evict each other from the L1 cache.
    size_t lane_stride() const { return weight.slots / (a8 ? 4 : 2) + 16; }
};

struct RowKernels;    // rows.h
struct GradientCall;  // gradient.h
struct GradientPanel;
struct LookupCall;  // lookup.h

// The code that depends on the instruction set.
struct Level {
    const char* name;
    // Activations of one row -> lanes, x_scales, x_sums.
    void (*quantize)(const Call&, int row);
    // Rows [m0, m1) x strips [s0, s1) of y.
    void (*multiply)(const Call&, int m0, int m1, int s0, int s1);
    // Rows [m0, m1) of x's gradient in the channels of a block; at most kGradientRows rows.
    void (*gradient)(const GradientCall&, int m0, int m1, int block, GradientPanel&);
    // A row of y; scratch: [in_features].
    void (*look_up)(const LookupCall&, int row, float* scratch);
    const RowKernels* rows;
};

extern const Level level_generic;
#ifdef __x86_64__
extern const Level level_avx2, level_avx_vnni, level_avx512, level_avx512_vnni;
#elif defined(__aarch64__)
extern const Level level_neon, level_neon_dotprod, level_neon_i8mm;
#endif

}  // namespace gptq
