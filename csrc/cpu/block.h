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

// y [rows][out_features] = x times the transpose of the weight, for gemm() or the like. Of shape, rows and dtype count.
Call call_of(const Linear& linear, const Rows& shape, const void* x, void* y);

// y = norm(x), both of shape.
void normalize(const Norm&, const Rows& shape, const void* x, void* y, int threads);

// ys[i] [rows][out_features] = norm(x) times the transpose of each weight. norm: null for x as it is.
void project(const Rows& shape, const void* x, const Norm* norm, const std::vector<const Linear*>& weights,
             const std::vector<void*>& ys, int threads);

// In x [rows][heads][head_dim], row r turns by the angles of row r % positions of cos and sin [positions][dims], after
// each head was normalized by `norm`, unless that is null.
void rotate(const Rows& shape, int heads, const Norm* norm, const Rotary& rotary, int positions, const void* cos,
            const void* sin, void* x, int threads);

void attend(const Attention&, int threads);

// What follows the attention: h = residual + factor * after_attention(o(x)), and n = before_mlp(h), the MLP's input; or
// before_mlp(residual) where MLP and attention read the same. Norms may be null.
struct Output {
    const Linear* o;
    const Norm *after_attention, *before_mlp;
    float factor;
    bool parallel;  // whether the MLP reads what the attention read
};
// shape: of h, n and residual. x: [rows][o's in_features].
void finish_attention(const Output&, const Rows& shape, const void* x, const void* residual, void* h, void* n,
                      int threads);

// y = residual + factor * norm(x), after which x is lost. norm: or null.
void add(const Norm* norm, float factor, const Rows& shape, const void* residual, void* x, void* y, int threads);

struct Tail;  // tail.h

// A whole decoder layer: y = Tail(attention(rotated norm(x) @ q, k, v), x).
struct Layer {
    const Norm* before_attention;
    std::vector<const Linear*> inputs;  // q, k and v, or one with the outputs of all
    const Norm* head_norms[2];          // of q and k: as wide as a head or as all of them; or null
    bool turns;                         // by the angles of the step
    Pairs pairs;
    int heads, kv_heads, head_dim;
    float scale, softcap;
    const Tail* tail;
};

// A layer's keys and values, [batch][kv_heads][capacity][head_dim], of which `length` positions are in use.
struct KeysAndValues {
    void *keys, *values;
    int length, capacity;
};

// One step of `batch` sequences, [batch][positions] rows.
struct Step {
    Dtype dtype;
    int batch, positions, width;
    const void *cos, *sin;  // [angle_rows][dims] of angles_dtype; angle_rows: positions, or batch * positions
    Dtype angles_dtype;
    int angle_rows, dims;
    const void* mask;  // as in Attention
    bool mask_is_bool;
    int64_t mask_strides[2];
};

// What follows the last layer: logits = head(norm(y)). The head is one of the two, the other is null.
struct Ending {
    const Norm* norm;
    const Linear* quantized;
    const Dense* dense;

    int width() const { return quantized ? quantized->weight.in_features : dense->width; }
};

// Where an Ending puts its results, of the dtype of the step.
struct Endings {
    void *normed, *logits;  // [batch][positions][width] and [outputs]
};

// Runs layers one after the other. Each writes its keys and values behind those in use, and its result to
// ys[layer] [batch][positions][width], which the next one reads. What mixtures choose goes to ids[layer], of each layer
// `ids_stride` numbers, or null. ending: or null. Nothing is written but these.
void run_layers(const std::vector<const Layer*>& layers, const std::vector<KeysAndValues>& caches, const Step& step,
                const void* x, void* ys, int32_t* ids, int64_t ids_stride, const Ending* ending, const Endings& results,
                int threads);

}  // namespace gptq
