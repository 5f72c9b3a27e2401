// Runs the steps of a decoder layer one after the other, each shared among threads.
#include "block.h"

#include <algorithm>
#include <cstring>

#include "gemm.h"
#include "row_sharing.h"
#include "scratch.h"

namespace gptq {
namespace {

void multiply(const Rows& shape, const void* x, const std::vector<const Linear*>& weights, const std::vector<void*>& ys,
              int threads) {
    std::vector<Call> calls;
    for (size_t i = 0; i < weights.size(); ++i) calls.push_back(call_of(*weights[i], shape, x, ys[i]));
    gemm(calls, threads);
}

// Memory that a thread keeps for the activations between two steps.
void* scratch(int which, const Rows& shape) {
    thread_local Scratch<char> kept[4];
    return kept[which].reserve(size_t(shape.rows) * shape.width * size_of(shape.dtype));
}

}  // namespace

void normalize(const Norm& norm, const Rows& shape, const void* x, void* y, int threads) {
    const RowKernels& rows = *level().rows;
    share_elements(shape.rows, int64_t(shape.rows) * shape.width, threads, [&](int row) {
        rows.normalize(norm, shape.dtype, row_of(x, shape, row), row_of(y, shape, row), shape.width);
    });
}

void add(const Norm* norm, float factor, const Rows& shape, const void* residual, void* x, void* y, int threads) {
    const RowKernels& rows = *level().rows;
    share_elements(shape.rows, int64_t(shape.rows) * shape.width, threads, [&](int row) {
        char* const from = row_of(x, shape, row);
        if (norm) rows.normalize(*norm, shape.dtype, from, from, shape.width);
        rows.add(shape.dtype, row_of(residual, shape, row), from, factor, row_of(y, shape, row), shape.width);
    });
}

Call call_of(const Linear& linear, const Rows& shape, const void* x, void* y) {
    Call call{};
    call.weight = linear.weight;
    call.x = x, call.y = y;
    call.dtype = shape.dtype;
    call.rows = shape.rows;
    call.bias = linear.bias;
    call.bias_dtype = linear.bias_dtype;
    call.a8 = linear.a8;
    return call;
}

void project(const Rows& shape, const void* x, const Norm* norm, const std::vector<const Linear*>& weights,
             const std::vector<void*>& ys, int threads) {
    in_parts(shape, [&](const Rows& some, int first) {
        const void* from = row_of(x, shape, first);
        if (norm) {
            void* const normed = scratch(0, some);
            normalize(*norm, some, from, normed, threads);
            from = normed;
        }
        std::vector<void*> to;
        for (size_t i = 0; i < ys.size(); ++i) {
            to.push_back(row_of(ys[i], {shape.dtype, 0, weights[i]->weight.out_features}, first));
        }
        multiply(some, from, weights, to, threads);
    });
}

void rotate(const Rows& shape, int heads, const Norm* norm, const Rotary& rotary, int positions, const void* cos,
            const void* sin, void* x, int threads) {
    const int head_dim = shape.width / heads;
    const Rows angles = {rotary.dtype, 0, rotary.dims};
    const RowKernels& rows = *level().rows;
    share_elements(shape.rows, int64_t(shape.rows) * shape.width, threads, [&](int row) {
        const void* const c = row_of(cos, angles, row % positions);
        const void* const s = row_of(sin, angles, row % positions);
        for (int i = 0; i < heads; ++i) {
            char* const head = row_of(x, shape, row) + int64_t(i) * head_dim * size_of(shape.dtype);
            if (norm) rows.normalize(*norm, shape.dtype, head, head, head_dim);
            if (rotary.dims) rows.rotate(rotary, shape.dtype, c, s, head);
        }
    });
}

namespace {

// Rows that share keys are computed together: keys and values are read, and turned into float32, once for all of them.
void attend_prompt(const Attention& a, int64_t elements, int threads) {
    const int at_once = prompt_rows(a), tiles = (a.rows + at_once - 1) / at_once;
    const RowKernels& rows = *level().rows;
    share_elements(a.batch * a.kv_heads * tiles, elements, threads, [&](int i) {
        thread_local Scratch<float> scratch;
        // The last tiles see most without a mask: they come first.
        const int tile = tiles - 1 - i % tiles, kv = i / tiles % a.kv_heads, first = tile * at_once;
        rows.attend_prompt(a, i / tiles / a.kv_heads, kv, first, std::min(at_once, a.rows - first),
                           scratch.reserve(prompt_scratch(a)));
    });
}

}  // namespace

void attend(const Attention& a, int threads) {
    const int group = a.heads / a.kv_heads, parts = (group + kHeadsAtOnce - 1) / kHeadsAtOnce;
    const int64_t elements = int64_t(a.batch) * a.rows * a.heads * a.length * (a.head_dim + a.value_dim);
    if (a.rows > kStepRows && group <= kQueries) return attend_prompt(a, elements, threads);
    const RowKernels& rows = *level().rows;
    share_elements(a.batch * a.rows * a.kv_heads * parts, elements, threads, [&](int i) {
        const int part = i % parts, kv = i / parts % a.kv_heads, row = i / parts / a.kv_heads;
        const int head = part * kHeadsAtOnce, count = std::min(kHeadsAtOnce, group - head);
        rows.attend(a, row / a.rows, row % a.rows, kv * group + head, count);
    });
}

namespace {

// Of as many rows as are done at a time.
void finish_attention_rows(const Output& out, const Rows& shape, const void* x, const void* residual, void* h, void* n,
                           int threads) {
    multiply({shape.dtype, shape.rows, out.o->weight.in_features}, x, {out.o}, {n}, threads);
    add(out.after_attention, out.factor, shape, residual, n, h, threads);
    const void* const from = out.parallel ? residual : h;
    if (out.before_mlp) {
        normalize(*out.before_mlp, shape, from, n, threads);
    } else {
        std::memcpy(n, from, int64_t(shape.rows) * shape.width * size_of(shape.dtype));
    }
}

}  // namespace

void finish_attention(const Output& out, const Rows& whole, const void* x, const void* residual, void* h, void* n,
                      int threads) {
    const Rows attended = {whole.dtype, 0, out.o->weight.in_features};
    const int64_t work = int64_t(whole.rows) * whole.width * attended.width;
    Crew::with(threads, work >= kSerialWork, [&] {
        in_parts(whole, [&](const Rows& some, int first) {
            finish_attention_rows(out, some, row_of(x, attended, first), row_of(residual, whole, first),
                                  row_of(h, whole, first), row_of(n, whole, first), threads);
        });
    });
}

}  // namespace gptq
