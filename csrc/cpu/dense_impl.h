// The kernel of dense.h, written once; a level supplies the Isa of kernel_impl.h.
#pragma once

#include "kernel_impl.h"
#include "rows.h"

namespace gptq {
namespace {

// As many weights as a vector has lanes, as floats.
template <class Isa, Dtype Type>
GPTQ_INLINE typename Vectors<Isa::lanes>::F load_weights(const char* from) {
    using Vec = Vectors<Isa::lanes>;
    if constexpr (Type == Dtype::f16) return Isa::load_f16(from);
    if constexpr (Type == Dtype::bf16) return Isa::load_bf16(from);
    return Vec::template load<typename Vec::F>(from);
}

// The sum of the lanes, in halves: additions one after the other would cost more than the product of a short row.
template <int Lanes>
GPTQ_INLINE float sum_of(typename Vectors<Lanes>::F v) {
    if constexpr (Lanes == 2) {
        return v[0] + v[1];
    } else {
        typename Vectors<Lanes / 2>::F halves[2];
        __builtin_memcpy(halves, &v, sizeof v);
        return sum_of<Lanes / 2>(halves[0] + halves[1]);
    }
}

// Outputs x Rows products, whose sums stay in registers. Rows of the weight are read side by side, as memory is fast
// with a few streams.
template <class Isa, Dtype Type, int Outputs, int Rows>
GPTQ_INLINE void tile_of_dots(const Dense& dense, int output, const float* x, int64_t x_stride, Dtype to, char* y) {
    using Vec = Vectors<Isa::lanes>;
    using F = typename Vec::F;
    constexpr int size = Type == Dtype::f32 ? 4 : 2;
    const int64_t stride = int64_t(dense.width) * size;
    const char* const weight = static_cast<const char*>(dense.weight) + output * stride;
    const int whole = dense.width / Isa::lanes * Isa::lanes;
    F sums[Rows][Outputs] = {};
    const auto add = [&](const F(&w)[Outputs], int i) __attribute__((always_inline)) {
        GPTQ_UNROLL for (int r = 0; r < Rows; ++r) {
            const F in = Vec::template load<F>(x + r * x_stride + i);
            GPTQ_UNROLL for (int o = 0; o < Outputs; ++o) sums[r][o] += w[o] * in;
        }
    };
    F w[Outputs];
    for (int i = 0; i < whole; i += Isa::lanes) {
        GPTQ_UNROLL for (int o = 0; o < Outputs; ++o) {
            const char* const from = weight + o * stride + int64_t(i) * size;
            w[o] = load_weights<Isa, Type>(from);
            __builtin_prefetch(from + Outputs * stride);  // what the next outputs will read
        }
        add(w, i);
    }
    if (whole < dense.width) {
        for (int o = 0; o < Outputs; ++o) {
            char last[Isa::lanes * size] = {};
            __builtin_memcpy(last, weight + o * stride + int64_t(whole) * size, (dense.width - whole) * size);
            w[o] = load_weights<Isa, Type>(last);
        }
        add(w, whole);
    }
    float bias[Outputs] = {}, total[Outputs];
    if (dense.bias) {
        const int64_t at = int64_t(output) * size_of(dense.bias_dtype);
        to_float<Isa>(dense.bias_dtype, static_cast<const char*>(dense.bias) + at, bias, Outputs);
    }
    for (int r = 0; r < Rows; ++r) {
        GPTQ_UNROLL for (int o = 0; o < Outputs; ++o) total[o] = bias[o] + sum_of<Isa::lanes>(sums[r][o]);
        from_float<Isa>(to, total, y + (int64_t(r) * dense.outputs + output) * size_of(to), Outputs);
    }
}

template <class Isa, Dtype Type, int Outputs>
GPTQ_INLINE void rows_of_dots(const Dense& dense, int output, const float* x, int64_t x_stride, int rows, Dtype to,
                              char* y) {
    const int64_t y_stride = int64_t(dense.outputs) * size_of(to);
    int row = 0;
    for (; row + 4 <= rows; row += 4) {
        tile_of_dots<Isa, Type, Outputs, 4>(dense, output, x + row * x_stride, x_stride, to, y + row * y_stride);
    }
    for (; row + 2 <= rows; row += 2) {
        tile_of_dots<Isa, Type, Outputs, 2>(dense, output, x + row * x_stride, x_stride, to, y + row * y_stride);
    }
    for (; row < rows; ++row) {
        tile_of_dots<Isa, Type, Outputs, 1>(dense, output, x + row * x_stride, x_stride, to, y + row * y_stride);
    }
}

template <class Isa, Dtype Type>
void dots_of(const Dense& dense, int first, int count, const float* x, int64_t x_stride, int rows, Dtype to, char* y) {
    constexpr int kOutputs = Isa::lanes >= 16 ? 4 : 2;  // with 4 rows, as many sums as fit the registers
    int output = first;
    for (; output + kOutputs <= first + count; output += kOutputs) {
        rows_of_dots<Isa, Type, kOutputs>(dense, output, x, x_stride, rows, to, y);
    }
    for (; output < first + count; ++output) rows_of_dots<Isa, Type, 1>(dense, output, x, x_stride, rows, to, y);
}

template <class Isa>
void dots(const Dense& dense, int first, int count, const float* x, int64_t x_stride, int rows, Dtype to, void* y) {
    char* const out = static_cast<char*>(y);
    switch (dense.dtype) {
        case Dtype::f32:
            return dots_of<Isa, Dtype::f32>(dense, first, count, x, x_stride, rows, to, out);
        case Dtype::bf16:
            return dots_of<Isa, Dtype::bf16>(dense, first, count, x, x_stride, rows, to, out);
        default:
            return dots_of<Isa, Dtype::f16>(dense, first, count, x, x_stride, rows, to, out);
    }
}

}  // namespace
}  // namespace gptq
