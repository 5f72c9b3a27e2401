// What a decoder layer does to rows of activations between its products. Computed in float32, stored in the dtype.
#pragma once

#include "kernel.h"

namespace gptq {

// y = (x - mean) / deviation * (weight + offset) + bias. Not centered: the mean is taken as 0 (RMSNorm).
struct Norm {
    const void *weight, *bias;  // [size] of dtype, or null: 1 and 0
    Dtype dtype;
    float eps, offset;
    bool centered;
    int size;  // 0: any
};

// A weight that is not quantized, [outputs][width] of dtype, with its bias [outputs] of bias_dtype or null.
struct Dense {
    const void* weight;
    Dtype dtype;
    int outputs, width;
    const void* bias;
    Dtype bias_dtype;
};

constexpr int kDotRows = 8, kDotAlignment = 16;  // rows that meet one row of a Dense at a time, and their length

enum class Activation : int { silu, gelu, gelu_tanh, relu, relu_squared };

// Which channels of a head turn together, and where their angle lies among the `dims` of a row of cosines and sines:
// those half of the turning channels apart, with an angle for each channel (LLaMA); neighbours likewise (GPT-J);
// neighbours, of each pair the angle in the first half of the row (GLM); halves, where the row is half as long
// (gpt-oss).
enum class Pairs : int { halves, neighbours, neighbours_by_pair, halves_by_pair };

// The first channels() channels of a head turn; the others stay.
struct Rotary {
    Dtype dtype;
    int dims;
    Pairs pairs;

    int channels() const { return pairs == Pairs::halves_by_pair ? 2 * dims : dims; }
};

constexpr int kMaxHead = 512;    // channels of a head
constexpr int kHeadsAtOnce = 4;  // that share keys and are computed together

// softmax(q @ k.T * scale + mask) @ v of the query rows of each sequence.
struct Attention {
    const void *q, *keys, *values;  // of dtype; channels of a head lie side by side
    void* out;                      // [batch][rows][heads][value_dim]
    Dtype dtype;
    int batch, rows, heads, kv_heads, head_dim, value_dim, length;
    int64_t q_strides[3];  // in elements, of batch, row, head
    int64_t k_strides[3];  // of batch, head, position
    int64_t v_strides[3];
    // Null: row t sees positions up to length - rows + t. Else bytes (0: hidden) or floats of dtype that are added.
    const void* mask;
    bool mask_is_bool;
    int64_t mask_strides[2];  // of batch, row
    float scale, softcap;     // softcap * tanh(score / softcap), unless 0
    const void* sinks;        // [heads] of sinks_dtype: the score of a position without a value; or null
    Dtype sinks_dtype;
};

// The part of a level that is not products. x, y: one row.
struct RowKernels {
    void (*normalize)(const Norm&, Dtype, const void* x, void* y, int n);
    void (*add)(Dtype, const void* a, const void* b, float factor, void* y, int n);         // a + factor * b
    void (*activate)(Activation, Dtype, const void* gate, const void* up, void* y, int n);  // up may be null
    void (*rotate)(const Rotary&, Dtype, const void* cos, const void* sin, void* head);
    // The sum of factors[i] times row i of x [count][n].
    void (*combine)(Dtype, const void* x, const float* factors, int count, void* y, int n);
    // Columns [first, first + count) of y [rows][outputs] of a dtype: x times the transpose of the weight, and the
    // bias. Rows are at most kDotRows, x_stride apart and, to a multiple of kDotAlignment, filled up with zeros.
    void (*dots)(const Dense&, int first, int count, const float* x, int64_t x_stride, int rows, Dtype, void* y);
    void (*widen)(Dtype, const void* x, float* y, int n);  // to float32
    // Heads [head, head + count) of one row; they have the same keys, and count is at most kHeadsAtOnce.
    void (*attend)(const Attention&, int batch, int row, int head, int count);
    // Rows [first, first + count) and all heads of one key; count is at most prompt_rows(), scratch what it says.
    void (*attend_prompt)(const Attention&, int batch, int kv, int first, int count, float* scratch);
};

constexpr int kStepRows = 8;    // of queries; more are a prompt
constexpr int kQueries = 192;   // that are computed together in a prompt: of as many rows, all heads that share keys
constexpr int kPositions = 64;  // that are looked at between two corrections of the running maximum

inline int padded(int n) {
    return (n + kStrip - 1) / kStrip * kStrip;
}

inline int prompt_rows(const Attention& a) {
    return kQueries / (a.heads / a.kv_heads);
}

// Floats: queries and sums, keys and values, masks.
inline size_t prompt_scratch(const Attention& a) {
    return (kQueries + kPositions) * (padded(a.head_dim) + padded(a.value_dim)) + kQueries * kPositions;
}

}  // namespace gptq
