// Runs all that follows the attention, from the steps of block.h, experts.h and router.h.
#include "tail.h"

#include <algorithm>
#include <cmath>

#include "dense.h"
#include "gemm.h"
#include "row_sharing.h"
#include "scratch.h"

namespace gptq {
namespace {

// What is kept between two steps.
enum Place { kHidden, kResult, kGate, kUp, kSum };

void* scratch(Place place, const Rows& shape) {
    thread_local Scratch<char> kept[5];
    return kept[place].reserve(size_t(shape.rows) * shape.width * size_of(shape.dtype));
}

void run_mlp(const MLP& m, const Rows& shape, const void* x, void* y, int threads) {
    const int inner = m.down->weight.in_features;
    const RowKernels& rows = *level().rows;
    const bool joined = m.gated && m.gate_up.size() == 1;
    const Rows middle = {shape.dtype, shape.rows, inner},
               outputs = {shape.dtype, shape.rows, joined ? 2 * inner : inner};
    void* const gate = scratch(kGate, outputs);
    void* const up = m.gated && !joined ? scratch(kUp, outputs) : nullptr;
    std::vector<void*> to = {gate};
    if (up) to.push_back(up);
    project(shape, x, nullptr, m.gate_up, to, threads);
    void* const activated = joined ? scratch(kUp, middle) : gate;
    share_elements(shape.rows, int64_t(shape.rows) * inner, threads, [&](int row) {
        char* const from = row_of(gate, outputs, row);
        const void* factor = up ? row_of(up, outputs, row) : nullptr;
        if (joined) factor = from + int64_t(inner) * size_of(shape.dtype);
        rows.activate(m.activation, shape.dtype, from, factor, row_of(activated, middle, row), inner);
    });
    project(middle, activated, nullptr, {m.down}, {y}, threads);
}

// beside: what the MLP made of x, or null.
void run_mixture(const Mixture& m, const Rows& shape, const void* x, const void* beside, int32_t* ids, void* y,
                 int threads) {
    const RowKernels& rows = *level().rows;
    thread_local Scratch<float> kept;
    const int top_k = m.router->top_k;
    float* const factors = kept.reserve(size_t(shape.rows) * top_k);
    route(*m.router, shape, x, ids, factors, threads);
    run_experts(*m.experts, {shape.rows, top_k, reinterpret_cast<uintptr_t>(ids), sizeof *ids, factors}, shape.dtype, x,
                y, threads);
    if (!beside) return;
    thread_local Scratch<float> kept_gates;
    float* const gates = kept_gates.reserve(shape.rows);
    if (m.mlp_gate) multiply(*m.mlp_gate, shape, x, Dtype::f32, gates, threads);
    share_elements(shape.rows, int64_t(shape.rows) * shape.width, threads, [&](int row) {
        const float factor = m.mlp_gate ? 1.0f / (1.0f + std::exp(-gates[row])) : 1.0f;
        char* const sum = row_of(y, shape, row);
        rows.add(shape.dtype, sum, row_of(beside, shape, row), factor, sum, shape.width);
    });
}

// h = residual + factor * after_attention(o(x)), and what comes out of MLP and mixture goes to y, before its norm. Both
// have the rows of `some`, of which `first` come before them.
void run_parts(const Tail& t, const Rows& whole, const Rows& some, int first, const void* x, const void* residual,
               void* h, int32_t* ids, void* y, int threads) {
    const Rows attended = {whole.dtype, some.rows, t.output.o->weight.in_features};
    void* const normed = scratch(kHidden, some);
    finish_attention(t.output, some, row_of(x, attended, first), row_of(residual, whole, first), h, normed, threads);
    void* const beside = t.mlp && t.mixture ? scratch(kResult, some) : y;
    if (t.mlp) run_mlp(*t.mlp, some, normed, beside, threads);
    if (!t.mixture) return;
    const int64_t chosen = int64_t(first) * t.mixture->router->top_k;
    run_mixture(*t.mixture, some, normed, t.mlp ? beside : nullptr, ids + chosen, y, threads);
}

// Multiplications for a row; the experts' are many more than a thread is worth waking for.
int64_t work_of(const Tail& t) {
    const Linear& down = t.mlp ? *t.mlp->down : t.mixture->experts->down;
    return int64_t(down.weight.in_features) * down.weight.out_features;
}

}  // namespace

void finish_layer(const Tail& t, const Rows& whole, const void* x, const void* residual, void* y, int32_t* ids,
                  int threads) {
    Crew::with(threads, whole.rows * work_of(t) >= kSerialWork, [&] {
        in_parts(whole, [&](const Rows& some, int first) {
            char* const h = row_of(y, whole, first);
            void* const sum = scratch(kSum, some);
            run_parts(t, whole, some, first, x, residual, h, ids, sum, threads);
            add(t.after_mlp, t.output.factor, some, h, sum, h, threads);
        });
    });
}

void end_layer(const Tail& t, const Rows& whole, const void* x, const void* residual, void* y, void* h, int threads) {
    Crew::with(threads, whole.rows * work_of(t) >= kSerialWork, [&] {
        in_parts(whole, [&](const Rows& some, int first) {
            char* const result = row_of(y, whole, first);
            run_parts(t, whole, some, first, x, residual, row_of(h, whole, first), nullptr, result, threads);
            if (t.after_mlp) normalize(*t.after_mlp, some, result, result, threads);
        });
    });
}

}  // namespace gptq
