// The gradient with respect to x: the packed weight times the gradient of y.
#pragma once

#include "kernel.h"

namespace gptq {

// x_grad = y_grad @ W. What is summed over are output channels, whose scales belong to a group: times these, the
// gradients of a few rows become int16 with a scale per row and kMaxBlock output channels, anew for every group.
// fp32 rows take two int16 "planes", as in Call.
struct GradientCall {
    Weight weight;
    const void* y_grad;  // [rows][out_features] of dtype
    void* x_grad;        // [rows][in_features] of dtype
    Dtype dtype;
    int rows;

    int planes() const { return dtype == Dtype::f32 ? 2 : 1; }
};

constexpr int kGradientRows = 96;  // of a task: their sums and integers stay in the L2 cache, codes are unpacked once

constexpr int kPairs = kMaxBlock / 2;                // of output channels, which are summed in int32
constexpr int kColumns = kMaxBlock / kStrip;         // of 16 slots
constexpr int kColumnStride = kPairs * kStrip + 16;  // not 2^n bytes: columns would evict each other from the L1 cache

// What a thread works on: a block of slots x up to kMaxBlock output channels x the rows of a task.
struct GradientPanel {
    // Paired words of a strip. Those behind the block's last one, which fill its last column, are left as they are.
    alignas(64) uint32_t words[kMaxBlock / 4][kStrip];
    alignas(64) uint32_t codes[kColumns][kColumnStride];       // [pair][16 slots], zeros subtracted
    alignas(64) int16_t y_grad[2 * kGradientRows][kMaxBlock];  // planes are neighbours
    alignas(64) float y_scales[2 * kGradientRows];             // of these integers
    alignas(64) float scales[kMaxBlock];                       // of the weight, by output channel
    alignas(64) float x_grad[kGradientRows][kColumns * kStrip];
};

// On `threads` threads; every value is computed by one of them.
void gradient(const GradientCall& call, int threads);

}  // namespace gptq
