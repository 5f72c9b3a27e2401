// Runs whole decoder layers, from the steps of block.h.
#include <cstring>

#include "block.h"
#include "crew.h"
#include "dense.h"
#include "gemm.h"
#include "row_sharing.h"
#include "scratch.h"
#include "tail.h"

namespace gptq {
namespace {

// Of the rows of one layer: q, k, v, and what attention makes of them.
enum Room { kQueries, kKeys, kValues, kJoined, kAttended };

char* scratch(Room which, int64_t elements, Dtype dtype) {
    thread_local Scratch<char> kept[5];
    return kept[which].reserve(elements * size_of(dtype));
}

// Copies columns [first, first + width) of rows as wide as `stride`.
void take_columns(const char* from, int64_t rows, int64_t stride, int64_t first, int64_t width, char* to) {
    for (int64_t row = 0; row < rows; ++row) std::memcpy(to + row * width, from + row * stride + first, width);
}

// q, k and v of all rows, before they turn.
void make_heads(const Layer& layer, const Step& step, const void* x, char* const (&parts)[3], int threads) {
    const Rows shape = {step.dtype, step.batch * step.positions, step.width};
    if (layer.inputs.size() == 3) {
        return project(shape, x, layer.before_attention, layer.inputs, {parts[0], parts[1], parts[2]}, threads);
    }
    const int64_t q = int64_t(layer.heads) * layer.head_dim, kv = int64_t(layer.kv_heads) * layer.head_dim;
    char* const joined = scratch(kJoined, shape.rows * (q + 2 * kv), step.dtype);
    project(shape, x, layer.before_attention, layer.inputs, {joined}, threads);
    const int64_t size = size_of(step.dtype), stride = (q + 2 * kv) * size;
    take_columns(joined, shape.rows, stride, 0, q * size, parts[0]);
    take_columns(joined, shape.rows, stride, q * size, kv * size, parts[1]);
    take_columns(joined, shape.rows, stride, (q + kv) * size, kv * size, parts[2]);
}

void turn(const Layer& layer, const Step& step, const Norm* norm, int heads, void* x, int threads) {
    Rows shape = {step.dtype, step.batch * step.positions, heads * layer.head_dim};
    if (norm && norm->size != layer.head_dim) {
        rotate(shape, 1, norm, {step.angles_dtype, 0, Pairs::halves}, 1, nullptr, nullptr, x, threads);
        norm = nullptr;
    }
    const Rotary rotary = {step.angles_dtype, layer.turns ? step.dims : 0, layer.pairs};
    if (norm || rotary.dims) rotate(shape, heads, norm, rotary, step.angle_rows, step.cos, step.sin, x, threads);
}

// x: [batch][positions][kv_heads][head_dim].
void store(const Layer& layer, const Step& step, const KeysAndValues& cache, const char* x, void* to) {
    const int64_t bytes = layer.head_dim * size_of(step.dtype);
    for (int64_t b = 0; b < step.batch; ++b) {
        for (int p = 0; p < step.positions; ++p) {
            for (int h = 0; h < layer.kv_heads; ++h, x += bytes) {
                const int64_t at = (b * layer.kv_heads + h) * cache.capacity + cache.length + p;
                std::memcpy(static_cast<char*>(to) + at * bytes, x, bytes);
            }
        }
    }
}

void attend_cache(const Layer& layer, const Step& step, const KeysAndValues& cache, const void* q, void* out,
                  int threads) {
    Attention a{};
    a.q = q, a.keys = cache.keys, a.values = cache.values, a.out = out;
    a.dtype = step.dtype;
    a.batch = step.batch, a.rows = step.positions, a.heads = layer.heads, a.kv_heads = layer.kv_heads;
    a.head_dim = a.value_dim = layer.head_dim;
    a.length = cache.length + step.positions;
    a.q_strides[2] = layer.head_dim;
    a.q_strides[1] = a.q_strides[2] * layer.heads;
    a.q_strides[0] = a.q_strides[1] * step.positions;
    a.k_strides[2] = layer.head_dim;
    a.k_strides[1] = a.k_strides[2] * cache.capacity;
    a.k_strides[0] = a.k_strides[1] * layer.kv_heads;
    std::memcpy(a.v_strides, a.k_strides, sizeof a.k_strides);
    a.mask = step.mask, a.mask_is_bool = step.mask_is_bool;
    std::memcpy(a.mask_strides, step.mask_strides, sizeof step.mask_strides);
    a.scale = layer.scale, a.softcap = layer.softcap;
    attend(a, threads);
}

}  // namespace

namespace {

void run(const std::vector<const Layer*>& layers, const std::vector<KeysAndValues>& caches, const Step& step,
         const void* x, void* ys, int32_t* ids, int64_t ids_stride, int threads) {
    const Rows shape = {step.dtype, step.batch * step.positions, step.width};
    char* y = static_cast<char*>(ys);
    for (size_t i = 0; i < layers.size(); ++i) {
        const Layer& layer = *layers[i];
        const int64_t q = int64_t(shape.rows) * layer.heads * layer.head_dim;
        const int64_t kv = int64_t(shape.rows) * layer.kv_heads * layer.head_dim;
        char* const parts[3] = {scratch(kQueries, q, step.dtype), scratch(kKeys, kv, step.dtype),
                                scratch(kValues, kv, step.dtype)};
        make_heads(layer, step, x, parts, threads);
        turn(layer, step, layer.head_norms[0], layer.heads, parts[0], threads);
        turn(layer, step, layer.head_norms[1], layer.kv_heads, parts[1], threads);
        store(layer, step, caches[i], parts[1], caches[i].keys);
        store(layer, step, caches[i], parts[2], caches[i].values);
        char* const attended = scratch(kAttended, q, step.dtype);
        attend_cache(layer, step, caches[i], parts[0], attended, threads);
        finish_layer(*layer.tail, shape, attended, x, y, ids ? ids + int64_t(i) * ids_stride : nullptr, threads);
        x = y;
        y += int64_t(shape.rows) * shape.width * size_of(shape.dtype);
    }
}

void end(const Ending& ending, const Rows& shape, const void* y, const Endings& results, int threads) {
    normalize(*ending.norm, shape, y, results.normed, threads);
    if (ending.quantized) {
        project(shape, results.normed, nullptr, {ending.quantized}, {results.logits}, threads);
    } else {
        multiply(*ending.dense, shape, results.normed, shape.dtype, results.logits, threads);
    }
}

}  // namespace

void run_layers(const std::vector<const Layer*>& layers, const std::vector<KeysAndValues>& caches, const Step& step,
                const void* x, void* ys, int32_t* ids, int64_t ids_stride, const Ending* ending, const Endings& results,
                int threads) {
    const Rows shape = {step.dtype, step.batch * step.positions, step.width};
    Crew::with(threads, true, [&] {
        run(layers, caches, step, x, ys, ids, ids_stride, threads);
        if (ending) end(*ending, shape, row_of(ys, shape, int64_t(layers.size() - 1) * shape.rows), results, threads);
    });
}

}  // namespace gptq
