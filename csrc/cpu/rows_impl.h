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

constexpr int kPositions = 64;  // that are looked at between two corrections of the running maximum
// Scores up to this one are not seen: below them are -infinity, and the least number that dtypes other than fp16 hold.
constexpr float kHidden = -3.0e38f;

// Of up to kHeadsAtOnce heads: what a pass over the positions keeps.
struct Heads {
    alignas(64) float q[kHeadsAtOnce][kMaxHead];
    alignas(64) float sums[kHeadsAtOnce][kMaxHead];
    alignas(64) float scores[kHeadsAtOnce][kPositions];
    float largest[kHeadsAtOnce], total[kHeadsAtOnce];
};

GPTQ_INLINE int padded(int n) {
    return (n + kStrip - 1) / kStrip * kStrip;
}

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

// Turns scores into powers relative to the largest so far, and corrects what came before.
GPTQ_INLINE void soften(Heads& h, int g, int count, int width) {
    float* scores = h.scores[g];
    float largest = h.largest[g];
    for (int p = 0; p < count; ++p) largest = scores[p] > largest ? scores[p] : largest;
    if (largest > h.largest[g]) {
        const float correction = h.largest[g] > kHidden ? exponential(h.largest[g] - largest) : 0.0f;
        for (int i = 0; i < width; ++i) h.sums[g][i] *= correction;
        h.total[g] *= correction;
        h.largest[g] = largest;
    }
    for (int p = 0; p < count; ++p) {  // NaN stays
        scores[p] = scores[p] <= kHidden ? 0.0f : exponential(scores[p] - largest);
    }
    for (int p = 0; p < count; ++p) h.total[g] += scores[p];
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
        h.largest[g] = kHidden;
        h.total[g] = 0.0f;
        if (a.sinks) {
            to_float<Isa>(a.sinks_dtype, element(a.sinks, a.sinks_dtype, head + g), &h.largest[g], 1);
            h.total[g] = 1.0f;  // e to the power of its score less the largest
        }
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
            if (a.softcap != 0.0f) {
                for (int p = 0; p < count; ++p) {
                    h.scores[g][p] = a.softcap * hyperbolic_tangent(h.scores[g][p] / a.softcap);
                }
            }
            if (a.mask) {
                for (int p = 0; p < count; ++p) h.scores[g][p] += hidden[p];
            }
            soften(h, g, count, v_width);
        }
        gather_values<Isa>(a, h, values + first * a.v_strides[2] * size, count, heads);
    }
    for (int g = 0; g < heads; ++g) {
        const float inverse = h.total[g] != 0.0f ? 1.0f / h.total[g] : 0.0f;
        for (int i = 0; i < a.value_dim; ++i) h.sums[g][i] *= inverse;
        const int64_t at = (int64_t(batch * a.rows + row) * a.heads + head + g) * a.value_dim;
        from_float<Isa>(a.dtype, h.sums[g], element(a.out, a.dtype, at), a.value_dim);
    }
}

template <class Isa>
constexpr RowKernels row_kernels = {normalize<Isa>, add<Isa>,  activate<Isa>, rotate<Isa>,
                                    combine<Isa>,   dots<Isa>, widen<Isa>,    attend<Isa>};

}  // namespace
}  // namespace gptq
