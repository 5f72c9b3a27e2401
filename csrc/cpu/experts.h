// The MLPs of a mixture's experts, in one call over the products of gemm.h.
#pragma once

#include "block.h"

namespace gptq {

// Of each expert, down(activation(gate(x)) * up(x)).
struct ExpertMLPs {
    // The first of the stack [parts][count]: gate and up; or one weight with the outputs of both; or up alone.
    Linear gate_up;
    int parts, count;
    Activation activation;
    Linear down;  // the first of the stack [count]
};

// Which experts see which token, and what their results count.
struct Choice {
    int tokens, top_k;
    uintptr_t ids;  // address of [tokens][top_k] of id_size bytes; outside of 0..count-1 for none
    int id_size;
    const float* factors;  // [tokens][top_k]
};

// y[token] = the sum over k of factors[token][k] times what the chosen expert makes of x[token].
void run_experts(const ExpertMLPs&, const Choice&, Dtype, const void* x, void* y, int threads);

}  // namespace gptq
