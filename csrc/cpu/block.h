// What lies between the attention of one decoder layer and the next, in few calls over the products of gemm.h.
#pragma once

#include <vector>

#include "kernel.h"
#include "rows.h"

namespace gptq {

struct Linear {
    Weight weight;
    const void* bias;  // [out_features] of bias_dtype, or null
    Dtype bias_dtype;
    bool a8;
};

// Rows of activations side by side, [rows][width] of dtype.
struct Rows {
    Dtype dtype;
    int rows, width;
};

// ys[i] [rows][out_features] = norm(x) times the transpose of each weight. norm: null for x as it is.
void project(const Rows& shape, const void* x, const Norm* norm, const std::vector<const Linear*>& weights,
             const std::vector<void*>& ys, int threads);

// In x [rows][heads][head_dim], row r turns by the angles of row r % positions of cos and sin [positions][dims], after
// each head was normalized by `norm`, unless that is null.
void rotate(const Rows& shape, int heads, const Norm* norm, const Rotary& rotary, int positions, const void* cos,
            const void* sin, void* x, int threads);

void attend(const Attention&, int threads);

// What follows the attention: h = residual + factor * after_attention(o(x)), then
// y = h + factor * after_mlp(down(activation(gate(n)) * up(n))) with n = before_mlp(h). Norms may be null.
struct Tail {
    const Linear* o;
    const Norm *after_attention, *before_mlp, *after_mlp;
    std::vector<const Linear*> gate_up;  // gate and up; or one weight with the outputs of both, unless gated is false
    bool gated;
    Activation activation;
    const Linear* down;
    float factor;
};
// shape: of y and residual. x: [rows][o's in_features].
void finish_layer(const Tail&, const Rows& shape, const void* x, const void* residual, void* y, int threads);

}  // namespace gptq
