// The kernel of gradient.h, written once; a level supplies the Isa of kernel_impl.h.
//
// Lanes are slots, and a lane of 32 bits holds the codes of two output channels, so that sums over output channels are
// the dot products of the forward kernel. For that, codes change places while they are unpacked: see `paired`.
#pragma once

#include "gradient.h"
#include "kernel_impl.h"

namespace gptq {
namespace {

// -- codes -------------------------------------------------------------------------------------------------------

// Where the code of slot `i` of a word lies in its half of the word; of 3 bits, the two low bits.
template <int Bits>
constexpr int shift_of(int i) {
    return i / 2 * (Bits == 3 ? 2 : Bits);
}
// The third bit lies here in the run's last word, behind the bits of as many words as come before it in the run.
constexpr int high_shift_of(int i) {
    return i / 2 % 4 * 2 + i / 2 / 4 * 8;
}

// Words of 16 output channels -> for each pair of channels (n, n+1) the lower halves of n and n+1 as one word, which
// hold the even slots, and the upper halves as another, which hold the odd slots. Repeated over a register these two
// are the words from which lanes of consecutive slots take their codes.
GPTQ_INLINE void pair_up(const uint32_t* words, uint32_t* out) {
    typedef uint64_t Wide __attribute__((vector_size(kStrip * 4)));
    Wide both;
    __builtin_memcpy(&both, words, sizeof both);
    both = (both & 0xffff00000000ffffu) | ((both >> 16) & 0xffff0000u) | ((both << 16) & 0x0000ffff00000000u);
    __builtin_memcpy(out, &both, sizeof both);
}

// A register that repeats two words.
template <class U>
GPTQ_INLINE U repeat(const uint32_t* two) {
    typedef uint64_t Wide __attribute__((vector_size(sizeof(U))));
    uint64_t both;
    __builtin_memcpy(&both, two, sizeof both);
    return U(both - Wide{});
}

// 16 slots of a strip: [pair][16 slots]. words: paired, the first of these slots'; number: of the 3-bit word in its
// run.
template <class Isa, int Bits>
GPTQ_INLINE void unpack_column(const uint32_t (*words)[kStrip], int number, const uint32_t* zeros, uint32_t* out) {
    using Vec = Vectors<Isa::lanes>;
    using U = typename Vec::U;
    using I = typename Vec::I;
    typedef uint16_t Halves __attribute__((vector_size(sizeof(U))));
    constexpr int run = Bits == 3 ? 16 : 32 / Bits;  // slots of a word
    constexpr uint32_t mask = 0x00010001u * ((1u << (Bits == 3 ? 2 : Bits)) - 1);
    GPTQ_UNROLL for (int lane = 0; lane < kStrip; lane += Isa::lanes) {
        U shifts, high_shifts, word;
        GPTQ_UNROLL for (int i = 0; i < Isa::lanes; ++i) {
            shifts[i] = shift_of<Bits>((lane + i) % run);
            high_shifts[i] = high_shift_of((lane + i) % run);
            word[i] = i / run;
        }
        high_shifts += number;
        GPTQ_UNROLL for (int p = 0; p < kStrip / 2; ++p) {
            U from = repeat<U>(&words[lane / run][2 * p]);
            GPTQ_UNROLL for (int i = 1; i * run < Isa::lanes; ++i) {
                const I here = word >= uint32_t(i);
                from = here ? repeat<U>(&words[lane / run + i][2 * p]) : from;
            }
            U codes = (from >> shifts) & mask;
            if constexpr (Bits == 3) {
                codes |= ((repeat<U>(&words[2 - number][2 * p]) >> high_shifts) & 0x00010001u) << 2;
            }
            Vec::store(out + p * kStrip + lane, U(Halves(codes) - Halves(Vec::splat(zeros[p]))));
        }
    }
}

template <class Isa, int Bits>
GPTQ_INLINE void unpack_strip(const Weight& w, int strip, int b, GradientPanel& p, int pair) {
    const int k0 = w.blocks[3 * b], k1 = w.blocks[3 * b + 1], group = w.blocks[3 * b + 2];
    alignas(64) uint32_t zeros[kStrip / 2];
    if (w.zeros) {
        alignas(64) int32_t each[kStrip];
        load_zeros(w, strip, group, each);
        for (int i = 0; i < kStrip / 2; ++i) zeros[i] = uint32_t(each[2 * i]) | uint32_t(each[2 * i + 1]) << 16;
    } else {
        for (int i = 0; i < kStrip / 2; ++i) zeros[i] = 0x00010001u << (Bits - 1);
    }
    const uint32_t* words = words_at<Bits>(w, strip, k0);
    const size_t next = size_t(w.slots) * Bits / 32 * kStrip;
    const int count = (k1 - k0) * Bits / 32;
    for (int i = 0; i < count; ++i) {
        __builtin_prefetch(words + next + i * kStrip);  // of the next strip: too far for the hardware to foresee
        pair_up(words + i * kStrip, p.words[i]);
    }
    uint32_t* out = p.codes[0] + pair * kStrip;
    for (int k = 0; k < k1 - k0; k += kStrip, out += kColumnStride) {
        const int number = Bits == 3 ? k / kStrip % 2 : 0;
        unpack_column<Isa, Bits>(p.words + (Bits == 3 ? k / 32 * 3 + number : k * Bits / 32), number, zeros, out);
    }
}

// -- gradients of y ----------------------------------------------------------------------------------------------

// Of output channels [n0, n0 + n) of row m, as integers: n is padded with zeros to whole strips.
template <class Isa>
GPTQ_INLINE void quantize_gradient(const GradientCall& c, int m, int n0, int n, GradientPanel& p, int row) {
    alignas(64) float d[kMaxBlock];
    const int padded = (n + kStrip - 1) / kStrip * kStrip, size = size_of(c.dtype);
    const size_t at = size_t(m) * c.weight.out_features + n0;
    to_float<Isa>(c.dtype, static_cast<const char*>(c.y_grad) + at * size, d, n);
    for (int i = n; i < padded; ++i) d[i] = 0.0f;
    uint32_t largest = 0;
    for (int i = 0; i < padded; ++i) {
        d[i] *= p.scales[i];
        const uint32_t magnitude = float_to_bits(d[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    const int planes = c.planes();
    int16_t* q = p.y_grad[row * planes];
    float* units = p.y_scales + row * planes;
    if (largest >= 0x7f800000u) {  // A row with an infinity or NaN comes out as NaN.
        for (int i = 0; i < planes * kMaxBlock; ++i) q[i] = 0;
        for (int i = 0; i < planes; ++i) units[i] = bits_to_float(0x7fc00000u);
        return;
    }
    // As quantize16 does: scales are powers of two.
    int exponent = int(largest >> 23) - 127;
    if (exponent < -100) exponent = -100;
    const float unit = bits_to_float(uint32_t(exponent - 14 + 127) << 23);
    const float inverse = bits_to_float(uint32_t(14 - exponent + 127) << 23);
    units[0] = unit;
    for (int i = 0; i < padded; ++i) {
        const int32_t v = round_to_int(d[i] * inverse);
        q[i] = int16_t(v < 32767 ? v : 32767);
    }
    if (planes == 1) return;
    units[1] = unit * (1.0f / 32768);
    for (int i = 0; i < padded; ++i) {
        q[kMaxBlock + i] = int16_t(round_to_int((d[i] * inverse - float(q[i])) * 32768.0f));
    }
}

// -- products ----------------------------------------------------------------------------------------------------

// Rows x Columns of x_grad += `pairs` pairs of output channels. row: of integers.
template <class Isa, int Rows, int Columns>
void gradient_tile(GradientPanel& p, int planes, int pairs, int row, int column) {
    using Vec = Vectors<Isa::lanes>;
    using U = typename Vec::U;
    using I = typename Vec::I;
    using F = typename Vec::F;
    constexpr int V = kStrip / Isa::lanes;
    I sums[Rows][Columns][V] = {};
    const char* const y = reinterpret_cast<const char*>(p.y_grad[row]);
    for (int j = 0; j < pairs; ++j) {
        U codes[Columns][V];
        GPTQ_UNROLL for (int s = 0; s < Columns; ++s) {
            GPTQ_UNROLL for (int v = 0; v < V; ++v) {
                codes[s][v] = Vec::template load<U>(&p.codes[column + s][j * kStrip + v * Isa::lanes]);
            }
        }
        GPTQ_UNROLL for (int r = 0; r < Rows; ++r) {
            uint32_t two;
            __builtin_memcpy(&two, y + r * sizeof(p.y_grad[0]) + j * sizeof two, sizeof two);
            const U lanes = Vec::splat(two);
            GPTQ_UNROLL for (int s = 0; s < Columns; ++s) {
                GPTQ_UNROLL for (int v = 0; v < V; ++v) {
                    sums[r][s][v] = Isa::template dot<Dot::i16>(sums[r][s][v], codes[s][v], lanes);
                }
            }
        }
    }
    GPTQ_UNROLL for (int r = 0; r < Rows; ++r) {
        float* const x_grad = p.x_grad[(row + r) / planes] + column * kStrip;
        GPTQ_UNROLL for (int i = 0; i < Columns * V; ++i) {
            float* const out = x_grad + i * Isa::lanes;
            const F sum = __builtin_convertvector(sums[r][i / V][i % V], F);
            Vec::store(out, Vec::template load<F>(out) + sum * p.y_scales[row + r]);
        }
    }
}

template <class Isa, int Rows>
GPTQ_INLINE void row_of_gradient_tiles(GradientPanel& p, int planes, int pairs, int row, int columns) {
    constexpr int most = Isa::gradient_columns, half = most > 1 ? most / 2 : 1;
    int s = 0;
    for (; s + most <= columns; s += most) gradient_tile<Isa, Rows, most>(p, planes, pairs, row, s);
    for (; s + half <= columns; s += half) gradient_tile<Isa, Rows, half>(p, planes, pairs, row, s);
    for (; s < columns; ++s) gradient_tile<Isa, Rows, 1>(p, planes, pairs, row, s);
}

template <class Isa, int Rows>
GPTQ_INLINE void last_gradient_rows(GradientPanel& p, int planes, int pairs, int row, int rows, int columns) {
    if constexpr (Rows > 0) {
        if (rows == Rows) return row_of_gradient_tiles<Isa, Rows>(p, planes, pairs, row, columns);
        last_gradient_rows<Isa, Rows - 1>(p, planes, pairs, row, rows, columns);
    }
}

// -- results -----------------------------------------------------------------------------------------------------

template <class T>
GPTQ_INLINE void scatter(const void* in, int channels, const int32_t* perm, void* x_grad, int n) {
    for (int i = 0; i < n; ++i) {
        if (uint32_t(perm[i]) < uint32_t(channels)) static_cast<T*>(x_grad)[perm[i]] = static_cast<const T*>(in)[i];
    }
}

template <class Isa>
GPTQ_INLINE void finish_gradient(const GradientCall& c, int m, int k0, int k1, const float* sums) {
    const int width = c.weight.in_features, size = size_of(c.dtype);
    char* const x_grad = static_cast<char*>(c.x_grad) + size_t(m) * width * size;
    if (!c.weight.perm) {
        const int n = (k1 < width ? k1 : width) - k0;
        if (n > 0) from_float<Isa>(c.dtype, sums, x_grad + size_t(k0) * size, n);
        return;
    }
    alignas(64) uint32_t out[kMaxBlock];
    from_float<Isa>(c.dtype, sums, out, k1 - k0);
    if (size == 4) {
        scatter<uint32_t>(out, width, c.weight.perm + k0, x_grad, k1 - k0);
    } else {
        scatter<uint16_t>(out, width, c.weight.perm + k0, x_grad, k1 - k0);
    }
}

template <class Isa, int Bits>
void gradient_bits(const GradientCall& c, int m0, int m1, int b, GradientPanel& p) {
    const Weight& w = c.weight;
    const int planes = c.planes(), rows = (m1 - m0) * planes, strips = w.strips();
    const int k0 = w.blocks[3 * b], k1 = w.blocks[3 * b + 1], group = w.blocks[3 * b + 2];
    const int columns = (k1 - k0 + kStrip - 1) / kStrip;
    __builtin_memset(p.x_grad, 0, sizeof(p.x_grad[0]) * (m1 - m0));
    for (int s0 = 0; s0 < strips; s0 += kColumns) {
        const int s1 = s0 + kColumns < strips ? s0 + kColumns : strips, n0 = s0 * kStrip;
        const int n = s1 * kStrip < w.out_features ? (s1 - s0) * kStrip : w.out_features - n0;
        const int pairs = (s1 - s0) * kStrip / 2;
        for (int s = s0; s < s1; ++s) {
            load_scales<Isa>(w, s, group, p.scales + (s - s0) * kStrip);
            unpack_strip<Isa, Bits>(w, s, b, p, (s - s0) * kStrip / 2);
        }
        for (int m = m0; m < m1; ++m) quantize_gradient<Isa>(c, m, n0, n, p, m - m0);
        int row = 0;
        for (; row + Isa::gradient_rows <= rows; row += Isa::gradient_rows) {
            row_of_gradient_tiles<Isa, Isa::gradient_rows>(p, planes, pairs, row, columns);
        }
        last_gradient_rows<Isa, Isa::gradient_rows - 1>(p, planes, pairs, row, rows - row, columns);
    }
    for (int m = m0; m < m1; ++m) finish_gradient<Isa>(c, m, k0, k1, p.x_grad[m - m0]);
}

template <class Isa>
void gradient(const GradientCall& c, int m0, int m1, int b, GradientPanel& p) {
    switch (c.weight.bits) {
        case 2:
            return gradient_bits<Isa, 2>(c, m0, m1, b, p);
        case 3:
            return gradient_bits<Isa, 3>(c, m0, m1, b, p);
        case 4:
            return gradient_bits<Isa, 4>(c, m0, m1, b, p);
        case 8:
            return gradient_bits<Isa, 8>(c, m0, m1, b, p);
    }
}

}  // namespace
}  // namespace gptq
