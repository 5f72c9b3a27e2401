// Runs a mixture's experts: two grouped products, what lies between them, and the weighted sum.
#include "experts.h"

#include "gemm.h"
#include "row_sharing.h"
#include "scratch.h"

namespace gptq {
namespace {

void* scratch(int which, const Rows& shape) {
    thread_local Scratch<char> kept[3];
    return kept[which].reserve(size_t(shape.rows) * shape.width * size_of(shape.dtype));
}

}  // namespace

void run_experts(const ExpertMLPs& m, const Choice& choice, Dtype dtype, const void* x, void* y, int threads) {
    const int rows = choice.tokens * choice.top_k, inner = m.down.weight.in_features;
    const Rows outputs = {dtype, rows, m.parts * m.gate_up.weight.out_features};
    const Rows middle = {dtype, rows, inner}, wide = {dtype, rows, m.down.weight.out_features};
    const int64_t gate_bytes = int64_t(inner) * size_of(dtype);
    const bool gated = outputs.width > inner;
    const RowKernels& kernels = *level().rows;
    Crew::with(threads, int64_t(rows) * inner * wide.width >= kSerialWork, [&] {
        void* const both = scratch(0, outputs);
        void* const activated = scratch(1, middle);
        void* const results = scratch(2, wide);
        moe_gemm(call_of(m.gate_up, outputs, x, both), {choice.ids, choice.id_size, m.count, m.parts, choice.top_k},
                 threads);
        share_elements(rows, int64_t(rows) * inner, threads, [&](int row) {
            char* const gate = row_of(both, outputs, row);
            const void* const up = gated ? gate + gate_bytes : nullptr;
            kernels.activate(m.activation, dtype, gate, up, row_of(activated, middle, row), inner);
        });
        moe_gemm(call_of(m.down, wide, activated, results), {choice.ids, choice.id_size, m.count, 1, 1}, threads);
        share_elements(choice.tokens, int64_t(rows) * wide.width, threads, [&](int token) {
            const int first = token * choice.top_k;
            kernels.combine(dtype, row_of(results, wide, first), choice.factors + first, choice.top_k,
                            row_of(y, wide, token), wide.width);
        });
    });
}

}  // namespace gptq
