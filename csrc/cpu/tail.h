// All that follows the attention of a decoder layer, in one call: with an MLP, a mixture of experts, or both.
#pragma once

#include "block.h"
#include "experts.h"
#include "router.h"

namespace gptq {

// down(activation(gate(x)) * up(x))
struct MLP {
    std::vector<const Linear*> gate_up;  // gate and up; or one weight with the outputs of both, unless gated is false
    bool gated;
    Activation activation;
    const Linear* down;
};

// The weighted sum of what the chosen experts make of x.
struct Mixture {
    const Router* router;
    const ExpertMLPs* experts;
    const Dense* mlp_gate;  // of one output: the MLP beside the experts counts sigmoid(mlp_gate(x)); null: it counts 1
};

// y = h + factor * after_mlp(mixture(n) + mlp(n)), with h, n and factor of Output. One of the two may be null.
struct Tail {
    Output output;
    const MLP* mlp;
    const Mixture* mixture;
    const Norm* after_mlp;  // or null
};
// shape: of y and residual. x: [rows][o's in_features]. ids [rows][top_k]: the experts that a mixture chose.
void finish_layer(const Tail&, const Rows& shape, const void* x, const void* residual, void* y, int32_t* ids,
                  int threads);

// h and y of a Tail without a mixture and of factor 1, apart: h = residual + after_attention(o(x)), and
// y = after_mlp(mlp(before_mlp(h))).
void end_layer(const Tail&, const Rows& shape, const void* x, const void* residual, void* y, void* h, int threads);

}  // namespace gptq
