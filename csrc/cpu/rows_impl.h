// The row kernels of rows.h, written once; a level supplies the Isa of kernel_impl.h.
#pragma once

#include "dense_impl.h"
#include "kernel_impl.h"
#include "rows.h"

namespace gptq {
namespace {

constexpr int kChunk = 512;  // floats on the stack at a time
constexpr int kWide = 16;    // partial sums side by side

// 2^(x / ln 2) by a polynomial of what is left of the integer power: within 2 units in the last place, over the whole
// range: what is too small for a float becomes 0, what is too large infinity.
GPTQ_INLINE float exponential(float x) {
    x = x < -104.0f ? -104.0f : (x > 89.0f ? 89.0f : x);
    const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // In two steps, because powers of 2 end before the results do.
    const int32_t power = int32_t(float_to_bits(shifted) - 0x4b400000u), part = power >> 1;
    return p * bits_to_float(uint32_t(part + 127) << 23) * bits_to_float(uint32_t(power - part + 127) << 23);
}

GPTQ_INLINE float sigmoid(float x) {
    return 1.0f / (1.0f + exponential(-x));
}

GPTQ_INLINE float hyperbolic_tangent(float x) {
    const float a = x < 0.0f ? -x : x, square = x * x;
    const float large = 1.0f - 2.0f / (exponential(2.0f * a) + 1.0f);
    // Near 0 the difference above would keep no digits (the coefficients are those of Cephes).
    float p = -5.70498872745e-3f;
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    const float y = a > 0.625f ? large : p * square * a + a;
    return x < 0.0f ? -y : y;
}

// 1 - erf(a) of a >= 0 by Numerical Recipes' erfcc: within 1.2e-7 of the result itself, however small that is.
GPTQ_INLINE float complementary_error(float a) {
    const float t = 1.0f / (1.0f + 0.5f * a);
    float p = 0.17087277f;
    p = p * t - 0.82215223f;
    p = p * t + 1.48851587f;
    p = p * t - 1.13520398f;
    p = p * t + 0.27886807f;
    p = p * t - 0.18628806f;
    p = p * t + 0.09678418f;
    p = p * t + 0.37409196f;
    p = p * t + 1.00002368f;
    p = p * t - 1.26551223f;
    return t * exponential(p - a * a);
}

// x times the normal distribution. Of the two tails the small one is computed, so that no digits cancel.
GPTQ_INLINE float gelu(float x) {
    const float tail = 0.5f * complementary_error((x < 0.0f ? -x : x) * 0.707106781f);
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

template <Activation Kind>
GPTQ_INLINE float activated(float x) {
    if constexpr (Kind == Activation::silu) return x * sigmoid(x);
    if constexpr (Kind == Activation::gelu) return gelu(x);
    if constexpr (Kind == Activation::gelu_tanh) return x * sigmoid(1.595769122f * (x + 0.044715f * x * x * x));
    const float positive = x > 0.0f ? x : (x == x ? 0.0f : x);  // keeps NaN
    return Kind == Activation::relu ? positive : positive * positive;
}

GPTQ_INLINE const void* element(const void* p, Dtype dtype, int64_t i) {
    return static_cast<const char*>(p) + i * size_of(dtype);
}

GPTQ_INLINE void* element(void* p, Dtype dtype, int64_t i) {
    return static_cast<char*>(p) + i * size_of(dtype);
}

// Calls part(first, count) for chunks of [0, n).
template <class Part>
GPTQ_INLINE void in_chunks(int n, Part part) {
    for (int i = 0; i < n; i += kChunk) part(i, n - i < kChunk ? n - i : kChunk);
}

template <class Isa>
void normalize(const Norm& norm, Dtype dtype, const void* x, void* y, int n) {
    alignas(64) float in[kChunk], weight[kChunk], bias[kChunk];
    // The sum over the row of what `term` makes of an element.
    const auto total = [&](auto term) {
        float sums[kWide] = {};
        in_chunks(n, [&](int first, int count) {
            to_float<Isa>(dtype, element(x, dtype, first), in, count);
            int i = 0;
            for (; i + kWide <= count; i += kWide) {
                for (int j = 0; j < kWide; ++j) sums[j] += term(in[i + j]);
            }
            for (; i < count; ++i) sums[0] += term(in[i]);
        });
        float sum = 0.0f;
        for (int j = 0; j < kWide; ++j) sum += sums[j];
        return sum;
    };
    const float mean = norm.centered ? total([](float v) { return v; }) / float(n) : 0.0f;
    const float variance = total([&](float v) { return (v - mean) * (v - mean); }) / float(n);
    const float inverse = 1.0f / __builtin_sqrtf(variance + norm.eps);
    for (int i = 0; i < kChunk; ++i) weight[i] = 1.0f, bias[i] = 0.0f;
    in_chunks(n, [&](int first, int count) {
        to_float<Isa>(dtype, element(x, dtype, first), in, count);
        if (norm.weight) to_float<Isa>(norm.dtype, element(norm.weight, norm.dtype, first), weight, count);
        if (norm.bias) to_float<Isa>(norm.dtype, element(norm.bias, norm.dtype, first), bias, count);
        const float offset = norm.weight ? norm.offset : 0.0f;
        for (int i = 0; i < count; ++i) in[i] = (in[i] - mean) * inverse * (weight[i] + offset) + bias[i];
        from_float<Isa>(dtype, in, element(y, dtype, first), count);
    });
}

template <class Isa>
void combine(Dtype dtype, const void* x, const float* factors, int rows, void* y, int n) {
    alignas(64) float in[kChunk], sum[kChunk];
    in_chunks(n, [&](int first, int count) {
        for (int i = 0; i < count; ++i) sum[i] = 0.0f;
        for (int row = 0; row < rows; ++row) {
            to_float<Isa>(dtype, element(x, dtype, int64_t(row) * n + first), in, count);
            for (int i = 0; i < count; ++i) sum[i] += factors[row] * in[i];
        }
        from_float<Isa>(dtype, sum, element(y, dtype, first), count);
    });
}

template <class Isa>
void widen(Dtype dtype, const void* x, float* y, int n) {
    to_float<Isa>(dtype, x, y, n);
}

template <class Isa>
void add(Dtype dtype, const void* a, const void* b, float factor, void* y, int n) {
    alignas(64) float left[kChunk], right[kChunk];
    in_chunks(n, [&](int first, int count) {
        to_float<Isa>(dtype, element(a, dtype, first), left, count);
        to_float<Isa>(dtype, element(b, dtype, first), right, count);
        for (int i = 0; i < count; ++i) left[i] += factor * right[i];
        from_float<Isa>(dtype, left, element(y, dtype, first), count);
    });
}

template <class Isa, Activation Kind>
void activate_as(Dtype dtype, const void* gate, const void* up, void* y, int n) {
    alignas(64) float left[kChunk], right[kChunk];
    in_chunks(n, [&](int first, int count) {
        to_float<Isa>(dtype, element(gate, dtype, first), left, count);
        for (int i = 0; i < count; ++i) left[i] = activated<Kind>(left[i]);
        if (up) {
            to_float<Isa>(dtype, element(up, dtype, first), right, count);
            for (int i = 0; i < count; ++i) left[i] *= right[i];
        }
        from_float<Isa>(dtype, left, element(y, dtype, first), count);
    });
}

template <class Isa>
void activate(Activation kind, Dtype dtype, const void* gate, const void* up, void* y, int n) {
    switch (kind) {
        case Activation::silu:
            return activate_as<Isa, Activation::silu>(dtype, gate, up, y, n);
        case Activation::gelu:
            return activate_as<Isa, Activation::gelu>(dtype, gate, up, y, n);
        case Activation::gelu_tanh:
            return activate_as<Isa, Activation::gelu_tanh>(dtype, gate, up, y, n);
        case Activation::relu:
            return activate_as<Isa, Activation::relu>(dtype, gate, up, y, n);
        case Activation::relu_squared:
            return activate_as<Isa, Activation::relu_squared>(dtype, gate, up, y, n);
    }
}

template <class Isa>
void rotate(const Rotary& rotary, Dtype dtype, const void* cos, const void* sin, void* head) {
    alignas(64) float x[kMaxHead], c[kMaxHead], s[kMaxHead], y[kMaxHead];
    const int n = rotary.channels(), half = n / 2;
    to_float<Isa>(dtype, head, x, n);
    to_float<Isa>(rotary.dtype, cos, c, rotary.dims);
    to_float<Isa>(rotary.dtype, sin, s, rotary.dims);
    if (rotary.pairs == Pairs::neighbours_by_pair) {
        for (int i = n; i-- > 0;) c[i] = c[i / 2], s[i] = s[i / 2];
    }
    if (rotary.pairs == Pairs::halves_by_pair) {
        for (int i = 0; i < half; ++i) c[i + half] = c[i], s[i + half] = s[i];
    }
    if (rotary.pairs == Pairs::neighbours || rotary.pairs == Pairs::neighbours_by_pair) {
        for (int i = 0; i < n; i += 2) {
            y[i] = x[i] * c[i] - x[i + 1] * s[i];
            y[i + 1] = x[i + 1] * c[i + 1] + x[i] * s[i + 1];
        }
    } else {
        for (int i = 0; i < half; ++i) {
            y[i] = x[i] * c[i] - x[i + half] * s[i];
            y[i + half] = x[i + half] * c[i + half] + x[i] * s[i + half];
        }
    }
    from_float<Isa>(dtype, y, head, n);
}

// -- attention -------------------------------------------------------------------------------------------------------

// Scores up to this one are not seen: below them are -infinity, and the least number that dtypes other than fp16 hold.
constexpr float kHidden = -3.0e38f;

// Of one query: what a pass over the positions keeps, beside the sums [width] of values.
struct Softmax {
    float largest, total;

    // Turns scores into powers relative to the largest so far, and corrects what came before. Room for whole kWide.
    GPTQ_INLINE void soften(float* scores, int count, float* sums, int width) {
        const int whole = (count + kWide - 1) / kWide * kWide;
        for (int p = count; p < whole; ++p) scores[p] = -__builtin_inff();
        float most[kWide], more[kWide] = {}, found = largest;
        for (int i = 0; i < kWide; ++i) most[i] = largest;
        for (int p = 0; p < whole; p += kWide) {
            for (int i = 0; i < kWide; ++i) most[i] = scores[p + i] > most[i] ? scores[p + i] : most[i];
        }
        for (int i = 0; i < kWide; ++i) found = most[i] > found ? most[i] : found;
        if (found > largest) {
            const float correction = largest > kHidden ? exponential(largest - found) : 0.0f;
            for (int i = 0; i < width; ++i) sums[i] *= correction;
            total *= correction;
            largest = found;
        }
        for (int p = 0; p < whole; p += kWide) {
            for (int i = 0; i < kWide; ++i) {  // NaN stays
                scores[p + i] = scores[p + i] <= kHidden ? 0.0f : exponential(scores[p + i] - found);
                more[i] += scores[p + i];
            }
        }
        for (int i = 0; i < kWide; ++i) total += more[i];
    }
};

// Of up to kHeadsAtOnce heads: what a pass over the positions keeps.
struct Heads {
    alignas(64) float q[kHeadsAtOnce][kMaxHead];
    alignas(64) float sums[kHeadsAtOnce][kMaxHead];
    alignas(64) float scores[kHeadsAtOnce][kPositions];
    Softmax softmax[kHeadsAtOnce];
};

template <class Isa>
GPTQ_INLINE float dot(const float* a, const float* b, int n) {
    using Vec = Vectors<Isa::lanes>;
    using F = typename Vec::F;
    F sum = {};
    for (int i = 0; i < n; i += Isa::lanes) sum += Vec::template load<F>(a + i) * Vec::template load<F>(b + i);
    float parts[Isa::lanes], total = 0.0f;
    Vec::store(parts, sum);
    for (int i = 0; i < Isa::lanes; ++i) total += parts[i];
    return total;
}

// What the mask adds to the scores of `count` positions of one head; false if all are hidden.
template <class Isa>
GPTQ_INLINE bool load_mask(const Attention& a, const void* mask, int first, int count, float* out) {
    if (!a.mask_is_bool) {
        to_float<Isa>(a.dtype, element(mask, a.dtype, first), out, count);
        return true;
    }
    const uint8_t* seen = static_cast<const uint8_t*>(mask) + first;
    int any = 0;
    for (int i = 0; i < count; ++i) {
        any += seen[i];
        out[i] = seen[i] ? 0.0f : -__builtin_inff();
    }
    return any > 0;
}

template <class Isa>
GPTQ_INLINE void score(const Attention& a, Heads& h, const char* keys, int count, int heads) {
    alignas(64) float key[kMaxHead];
    const int size = size_of(a.dtype), width = padded(a.head_dim);
    for (int i = a.head_dim; i < width; ++i) key[i] = 0.0f;
    for (int p = 0; p < count; ++p) {
        to_float<Isa>(a.dtype, keys + p * a.k_strides[2] * size, key, a.head_dim);
        for (int g = 0; g < heads; ++g) h.scores[g][p] = dot<Isa>(h.q[g], key, width);
    }
}

template <class Isa>
GPTQ_INLINE Softmax begin_softmax(const Attention& a, int head) {
    Softmax found = {kHidden, 0.0f};
    if (a.sinks) {
        to_float<Isa>(a.sinks_dtype, element(a.sinks, a.sinks_dtype, head), &found.largest, 1);
        found.total = 1.0f;  // e to the power of its score less the largest
    }
    return found;
}

GPTQ_INLINE void cap(const Attention& a, float* scores, int count) {
    if (a.softcap == 0.0f) return;
    for (int p = 0; p < count; ++p) scores[p] = a.softcap * hyperbolic_tangent(scores[p] / a.softcap);
}

template <class Isa>
GPTQ_INLINE void write_result(const Attention& a, int batch, int row, int head, float total, float* sums) {
    const float inverse = total != 0.0f ? 1.0f / total : 0.0f;
    for (int i = 0; i < a.value_dim; ++i) sums[i] *= inverse;
    const int64_t at = (int64_t(batch * a.rows + row) * a.heads + head) * a.value_dim;
    from_float<Isa>(a.dtype, sums, element(a.out, a.dtype, at), a.value_dim);
}

template <class Isa>
GPTQ_INLINE void gather_values(const Attention& a, Heads& h, const char* values, int count, int heads) {
    using Vec = Vectors<Isa::lanes>;
    using F = typename Vec::F;
    alignas(64) float value[kMaxHead];
    const int size = size_of(a.dtype), width = padded(a.value_dim);
    for (int i = a.value_dim; i < width; ++i) value[i] = 0.0f;
    for (int p = 0; p < count; ++p) {
        to_float<Isa>(a.dtype, values + p * a.v_strides[2] * size, value, a.value_dim);
        for (int g = 0; g < heads; ++g) {
            const F weight = Vec::splat(h.scores[g][p]);
            for (int i = 0; i < width; i += Isa::lanes) {
                float* sum = &h.sums[g][i];
                Vec::store(sum, Vec::template load<F>(sum) + weight * Vec::template load<F>(value + i));
            }
        }
    }
}

template <class Isa>
void attend(const Attention& a, int batch, int row, int head, int heads) {
    Heads h;
    const int size = size_of(a.dtype), group = a.heads / a.kv_heads, kv = head / group;
    const int k_width = padded(a.head_dim), v_width = padded(a.value_dim);
    for (int g = 0; g < heads; ++g) {
        const int64_t at = batch * a.q_strides[0] + row * a.q_strides[1] + (head + g) * a.q_strides[2];
        for (int i = a.head_dim; i < k_width; ++i) h.q[g][i] = 0.0f;
        to_float<Isa>(a.dtype, element(a.q, a.dtype, at), h.q[g], a.head_dim);
        for (int i = 0; i < a.head_dim; ++i) h.q[g][i] *= a.scale;
        for (int i = 0; i < v_width; ++i) h.sums[g][i] = 0.0f;
        h.softmax[g] = begin_softmax<Isa>(a, head + g);
    }
    const char* keys = static_cast<const char*>(element(a.keys, a.dtype, batch * a.k_strides[0] + kv * a.k_strides[1]));
    const char* values =
        static_cast<const char*>(element(a.values, a.dtype, batch * a.v_strides[0] + kv * a.v_strides[1]));
    // With a mask, that decides alone.
    const int end = a.mask ? a.length : a.length - a.rows + row + 1;
    alignas(64) float hidden[kPositions];
    for (int first = 0; first < end; first += kPositions) {
        const int count = end - first < kPositions ? end - first : kPositions;
        if (a.mask) {
            const int64_t at = batch * a.mask_strides[0] + row * a.mask_strides[1];
            const void* mask = static_cast<const char*>(a.mask) + at * (a.mask_is_bool ? 1 : size);
            if (!load_mask<Isa>(a, mask, first, count, hidden)) continue;
        }
        score<Isa>(a, h, keys + first * a.k_strides[2] * size, count, heads);
        for (int g = 0; g < heads; ++g) {
            cap(a, h.scores[g], count);
            if (a.mask) {
                for (int p = 0; p < count; ++p) h.scores[g][p] += hidden[p];
            }
            h.softmax[g].soften(h.scores[g], count, h.sums[g], v_width);
        }
        gather_values<Isa>(a, h, values + first * a.v_strides[2] * size, count, heads);
    }
    for (int g = 0; g < heads; ++g) {
        write_result<Isa>(a, batch, row, head + g, h.softmax[g].total, h.sums[g]);
    }
}

// c [4][columns] = a [4][inner] @ b [inner][columns], or added to it. All lie in whole vectors of kStrip floats.
template <class Isa, bool adds, int vectors>
GPTQ_INLINE void multiply_four(const float* a, int a_stride, const float* b, int b_stride, float* c, int c_stride,
                               int inner, int first) {
    using Vec = Vectors<Isa::lanes>;
    using F = typename Vec::F;
    F sums[4][vectors];
    GPTQ_UNROLL for (int r = 0; r < 4; ++r) {
        GPTQ_UNROLL for (int v = 0; v < vectors; ++v) {
            sums[r][v] = adds ? Vec::template load<F>(c + r * c_stride + first + v * Isa::lanes) : F{};
        }
    }
    for (int k = 0; k < inner; ++k) {
        const float* row = b + int64_t(k) * b_stride + first;
        GPTQ_UNROLL for (int v = 0; v < vectors; ++v) {
            const F found = Vec::template load<F>(row + v * Isa::lanes);
            GPTQ_UNROLL for (int r = 0; r < 4; ++r) sums[r][v] += Vec::splat(a[r * a_stride + k]) * found;
        }
    }
    GPTQ_UNROLL for (int r = 0; r < 4; ++r) {
        GPTQ_UNROLL for (int v = 0; v < vectors; ++v) {
            Vec::store(c + r * c_stride + first + v * Isa::lanes, sums[r][v]);
        }
    }
}

template <class Isa, bool adds>
GPTQ_INLINE void multiply_four(const float* a, int a_stride, const float* b, int b_stride, float* c, int c_stride,
                               int inner, int columns) {
    constexpr int vectors = Isa::lanes >= 16 ? 4 : 2;  // as many sums as the registers of a level hold
    int first = 0;
    for (; first + vectors * Isa::lanes <= columns; first += vectors * Isa::lanes) {
        multiply_four<Isa, adds, vectors>(a, a_stride, b, b_stride, c, c_stride, inner, first);
    }
    for (; first < columns; first += Isa::lanes) {
        multiply_four<Isa, adds, 1>(a, a_stride, b, b_stride, c, c_stride, inner, first);
    }
}

// Keys of up to kPositions positions as columns [head_dim][kPositions], and their values [kPositions][width].
template <class Isa>
void load_positions(const Attention& a, const char* keys, const char* values, int count, float* k, float* v) {
    alignas(64) float key[kMaxHead];
    const int size = size_of(a.dtype), width = padded(a.value_dim);
    for (int p = 0; p < kPositions; ++p) {
        if (p < count) {
            to_float<Isa>(a.dtype, keys + p * a.k_strides[2] * size, key, a.head_dim);
            to_float<Isa>(a.dtype, values + p * a.v_strides[2] * size, v + p * width, a.value_dim);
            for (int i = 0; i < a.head_dim; ++i) k[i * kPositions + p] = key[i];
            for (int i = a.value_dim; i < width; ++i) v[p * width + i] = 0.0f;
        } else {
            for (int i = 0; i < a.head_dim; ++i) k[i * kPositions + p] = 0.0f;
        }
    }
}

template <class Isa>
void attend_prompt(const Attention& a, int batch, int kv, int first_row, int rows, float* scratch) {
    const int size = size_of(a.dtype), group = a.heads / a.kv_heads, queries = rows * group;
    const int k_width = padded(a.head_dim), v_width = padded(a.value_dim);
    float* const q = scratch;  // [kQueries][k_width], query i is head i % group of row i / group
    float* const sums = q + kQueries * k_width;
    float* const k = sums + kQueries * v_width;
    float* const v = k + k_width * kPositions;
    float* const hidden = v + kPositions * v_width;  // [rows][kPositions]
    alignas(64) float scores[4][kPositions];
    Softmax softmax[kQueries];
    for (int i = 0; i < (queries + 3) / 4 * 4; ++i) {
        float* const one = q + i * k_width;
        for (int j = 0; j < k_width; ++j) one[j] = 0.0f;
        for (int j = 0; j < v_width; ++j) sums[i * v_width + j] = 0.0f;
        if (i >= queries) continue;
        const int row = first_row + i / group, head = kv * group + i % group;
        const int64_t at = batch * a.q_strides[0] + row * a.q_strides[1] + head * a.q_strides[2];
        to_float<Isa>(a.dtype, element(a.q, a.dtype, at), one, a.head_dim);
        for (int j = 0; j < a.head_dim; ++j) one[j] *= a.scale;
        softmax[i] = begin_softmax<Isa>(a, head);
    }
    const char* keys = static_cast<const char*>(element(a.keys, a.dtype, batch * a.k_strides[0] + kv * a.k_strides[1]));
    const char* values =
        static_cast<const char*>(element(a.values, a.dtype, batch * a.v_strides[0] + kv * a.v_strides[1]));
    const int before = a.length - a.rows;  // positions that every row sees, where no mask tells
    const int end = a.mask ? a.length : before + first_row + rows;
    for (int first = 0; first < end; first += kPositions) {
        const int count = end - first < kPositions ? end - first : kPositions;
        bool any = !a.mask;
        for (int r = 0; a.mask && r < rows; ++r) {
            const int64_t at = batch * a.mask_strides[0] + (first_row + r) * a.mask_strides[1];
            const void* mask = static_cast<const char*>(a.mask) + at * (a.mask_is_bool ? 1 : size);
            any |= load_mask<Isa>(a, mask, first, count, hidden + r * kPositions);
        }
        if (!any) continue;
        load_positions<Isa>(a, keys + first * a.k_strides[2] * size, values + first * a.v_strides[2] * size, count, k,
                            v);
        for (int i = 0; i < queries; i += 4) {
            const int some = queries - i < 4 ? queries - i : 4;
            // Without a mask, the last of the four sees most.
            if (!a.mask && before + first_row + (i + some - 1) / group < first) continue;
            multiply_four<Isa, false>(q + i * k_width, k_width, k, kPositions, scores[0], kPositions, a.head_dim,
                                      kPositions);
            for (int r = 0; r < some; ++r) {
                const int row = (i + r) / group;
                cap(a, scores[r], count);
                int seen = count;
                if (a.mask) {
                    for (int p = 0; p < count; ++p) scores[r][p] += hidden[row * kPositions + p];
                } else {
                    const int last = before + first_row + row - first;
                    seen = last < 0 ? 0 : (last + 1 < count ? last + 1 : count);
                }
                softmax[i + r].soften(scores[r], seen, sums + (i + r) * v_width, v_width);
                for (int p = seen; p < count; ++p) scores[r][p] = 0.0f;
            }
            multiply_four<Isa, true>(scores[0], kPositions, v, v_width, sums + i * v_width, v_width, count, v_width);
        }
    }
    for (int i = 0; i < queries; ++i) {
        write_result<Isa>(a, batch, first_row + i / group, kv * group + i % group, softmax[i].total,
                          sums + i * v_width);
    }
}

template <class Isa>
constexpr RowKernels row_kernels = {normalize<Isa>, add<Isa>,   activate<Isa>, rotate<Isa>,       combine<Isa>,
                                    dots<Isa>,      widen<Isa>, attend<Isa>,   attend_prompt<Isa>};

}  // namespace
}  // namespace gptq
