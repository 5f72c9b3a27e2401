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

// On `threads` threads; every value is computed by one of them.
void gradient(const GradientCall& call, int threads);

}  // namespace gptq
