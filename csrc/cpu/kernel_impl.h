// The kernels, written once over GCC/Clang vector types; a level supplies
//
//     struct Isa {
//         static constexpr int lanes;         // int32 per register
//         static constexpr int rows, strips;  // accumulators that fit the register file
//         static constexpr int gradient_rows, gradient_columns;  // those of gradient_impl.h, in strips too
//         static constexpr bool pairs;        // whether dot sums Dot::i8_nibbles to two int16 per lane
//         I widen(I sums);                    // these two, added up, if so
//         template <Dot> I dot(I sum, U codes, U x);  // sum + the products of one lane
//         F load_f16(const void* in);         // as many as lanes
//         F load_bf16(const void* in);
//         void half_to_float(const uint16_t* in, float* out, int n);
//         void float_to_half(const float* in, uint16_t* out, int n);
//     };
#pragma once

#include "kernel.h"

#define GPTQ_INLINE inline __attribute__((always_inline))
#define GPTQ_UNROLL _Pragma("GCC unroll 32")

namespace gptq {
namespace {

// What a 32-bit lane holds: 2 codes below 256 against int16, or 4 against int8, which is easier for codes below 16.
enum class Dot { i16, i8, i8_nibbles };

template <int Lanes>
struct Vectors {
    typedef uint32_t U __attribute__((vector_size(Lanes * 4)));
    typedef int32_t I __attribute__((vector_size(Lanes * 4)));
    typedef float F __attribute__((vector_size(Lanes * 4)));

    template <class V>
    static GPTQ_INLINE V load(const void* p) {
        V v;
        __builtin_memcpy(&v, p, sizeof v);
        return v;
    }
    template <class V>
    static GPTQ_INLINE void store(void* p, V v) {
        __builtin_memcpy(p, &v, sizeof v);
    }
    static GPTQ_INLINE U splat(uint32_t x) { return x - U{}; }
    static GPTQ_INLINE F splat(float x) { return x - F{}; }
};

// How `Bits`-bit codes leave their words: run() codes of each channel lie in `words` words, and step j yields one
// vector of 32-bit lanes with 2 (A8: 4) codes each, in the order of the activations. docs/kernels.md has the drawing.
template <int Bits, bool A8>
struct Codes {
    static constexpr int words = Bits == 3 ? 3 : 1;
    static constexpr int run = Bits == 3 ? 32 : 32 / Bits;
    static constexpr int per_lane = A8 ? 4 : 2;
    static constexpr int steps = run / per_lane;
    // Channels whose products of codes below 16 and int8 sum to an int16, two by two: 2 * 8 * 15 * 127 < 2^15.
    static constexpr int pairs = 8 * per_lane;
    static constexpr Dot dot = !A8 ? Dot::i16 : (Bits == 8 ? Dot::i8 : Dot::i8_nibbles);
    // 3-bit planes are joined to 4-bit fields first: words 0 and 1 give one word of even and one of odd fields each.
    static constexpr int width = Bits == 3 ? 4 : Bits;
    static constexpr int joined(int j) { return Bits == 3 ? j / (steps / 2) * 2 + j % 2 : 0; }
    static constexpr int field(int j) { return Bits == 3 ? j % (steps / 2) / 2 : j; }

    template <class U>
    static GPTQ_INLINE U join(const U* word, int i) {
        if constexpr (Bits != 3) return word[0];
        const int a = i / 2;
        if (i % 2) return ((word[a] >> 2) & 0x33333333u) | ((word[2] >> a) & 0x44444444u);
        return (word[a] & 0x33333333u) | ((word[2] << (2 - a)) & 0x44444444u);
    }

    template <class U>
    static GPTQ_INLINE U step(const U* word, int j) {
        constexpr uint32_t ones = A8 ? 0x01010101u : 0x00010001u;
        const U from = join(word, joined(j));
        if (A8 && Bits == 8) return from;
        return (from >> (width * field(j))) & (ones * ((1u << width) - 1));
    }

    // For a single use it is cheaper to leave the codes where they stand, times 2^place(j), and to divide the sums.
    static constexpr int places = 8 / width;
    static constexpr int place(int j) { return width * (field(j) % places); }
    static constexpr bool has_places(int splits) { return !A8 && splits % (Bits == 3 ? 2 * places : places) == 0; }

    template <class U>
    static GPTQ_INLINE U step_in_place(const U* word, int j) {
        typedef uint16_t Halves __attribute__((vector_size(sizeof(U))));
        const U from = join(word, joined(j));
        const bool upper = field(j) >= places;
        const U codes = upper ? U(Halves(from) >> 8) : from;
        if (Bits == 8 && upper) return codes;
        return codes & (0x00010001u * ((1u << width) - 1) << place(j));
    }
};

GPTQ_INLINE float bits_to_float(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

GPTQ_INLINE uint32_t float_to_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}

template <class Isa>
GPTQ_INLINE void to_float(Dtype dtype, const void* in, float* out, int n) {
    if (dtype == Dtype::f32) {
        __builtin_memcpy(out, in, n * sizeof(float));
    } else if (dtype == Dtype::bf16) {
        const uint16_t* bf16 = static_cast<const uint16_t*>(in);
        for (int i = 0; i < n; ++i) out[i] = bits_to_float(uint32_t(bf16[i]) << 16);
    } else {
        Isa::half_to_float(static_cast<const uint16_t*>(in), out, n);
    }
}

template <class Isa>
GPTQ_INLINE void from_float(Dtype dtype, const float* in, void* out, int n) {
    if (dtype == Dtype::f32) {
        __builtin_memcpy(out, in, n * sizeof(float));
    } else if (dtype == Dtype::bf16) {
        uint16_t* bf16 = static_cast<uint16_t*>(out);
        for (int i = 0; i < n; ++i) {
            const uint32_t bits = float_to_bits(in[i]);
            const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
            bf16[i] = uint16_t(nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
        }
    } else {
        Isa::float_to_half(in, static_cast<uint16_t*>(out), n);
    }
}

GPTQ_INLINE int size_of(Dtype dtype) {
    return dtype == Dtype::f32 ? 4 : 2;
}

// -- activations -------------------------------------------------------------------------------------------------

template <class T>
GPTQ_INLINE void gather(const void* x, int channels, const int32_t* perm, void* out, int n) {
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(out);
    for (int i = 0; i < n; ++i) to[i] = uint32_t(perm[i]) < uint32_t(channels) ? from[perm[i]] : T(0);
}

// Channels of slots [k0, k1) as float32.
template <class Isa>
GPTQ_INLINE void load_block(const Call& c, int row, int k0, int k1, float* out) {
    const int size = size_of(c.dtype), n = k1 - k0, width = c.weight.in_features;
    if (c.x_rows) row = c.x_rows[row];
    const char* x = static_cast<const char*>(c.x) + size_t(row) * width * size;
    alignas(64) uint32_t raw[kMaxBlock];
    if (c.weight.perm) {
        if (size == 4) {
            gather<uint32_t>(x, width, c.weight.perm + k0, raw, n);
        } else {
            gather<uint16_t>(x, width, c.weight.perm + k0, raw, n);
        }
        to_float<Isa>(c.dtype, raw, out, n);
        return;
    }
    const int present = k1 <= width ? n : (width > k0 ? width - k0 : 0);
    to_float<Isa>(c.dtype, x + size_t(k0) * size, out, present);
    for (int i = present; i < n; ++i) out[i] = 0.0f;
}

// Round to nearest, |x| < 2^22: adding 1.5 * 2^23 leaves the integer in the low mantissa bits.
GPTQ_INLINE int32_t round_to_int(float x) {
    return int32_t(float_to_bits(x + 12582912.0f) - 0x4b400000u);
}

// Scales are powers of two, so that scaling itself is exact: 16-bit floats within 7 (bf16) or 4 (fp16) binades of the
// block's largest value lose nothing, the rest at most 2^-16 of it.
GPTQ_INLINE void quantize16(const Call& c, int row, int b, const float* x, int n, uint32_t largest) {
    int exponent = int(largest >> 23) - 127;
    if (exponent < -100) exponent = -100;
    const float unit = bits_to_float(uint32_t(exponent - 14 + 127) << 23);
    const float inverse = bits_to_float(uint32_t(14 - exponent + 127) << 23);
    const int k0 = c.weight.blocks[3 * b];
    const size_t stride = c.lane_stride();
    int16_t* q = reinterpret_cast<int16_t*>(c.lanes + size_t(row) * c.planes * stride) + k0;
    alignas(64) int32_t high[kMaxBlock];
    int32_t sum = 0;
    for (int i = 0; i < n; ++i) {
        int32_t v = round_to_int(x[i] * inverse);
        v = v > 32767 ? 32767 : (v < -32767 ? -32767 : v);
        high[i] = v;
        q[i] = int16_t(v);
        sum += v;
    }
    const size_t at = size_t(row) * c.planes * c.weight.n_blocks + b;
    c.x_scales[at] = unit;
    c.x_sums[at] = sum;
    if (c.planes == 1) return;
    q += 2 * stride;
    sum = 0;
    for (int i = 0; i < n; ++i) {
        const int32_t v = round_to_int((x[i] * inverse - float(high[i])) * 32768.0f);
        q[i] = int16_t(v);
        sum += v;
    }
    c.x_scales[at + c.weight.n_blocks] = unit * (1.0f / 32768);
    c.x_sums[at + c.weight.n_blocks] = sum;
}

GPTQ_INLINE void quantize8(const Call& c, int row, int b, const float* x, int n, uint32_t largest) {
    const float peak = bits_to_float(largest);
    const float inverse = peak > 1e-30f ? 127.0f / peak : 0.0f;
    const int run = c.weight.bits == 3 ? 16 : 32 / c.weight.bits;  // codes of one word
    int8_t* q = reinterpret_cast<int8_t*>(c.lanes + size_t(row) * c.lane_stride()) + c.weight.blocks[3 * b];
    alignas(64) int8_t natural[kMaxBlock];
    int32_t sum = 0;
    for (int i = 0; i < n; ++i) {
        const int32_t v = round_to_int(x[i] * inverse);
        natural[i] = int8_t(v);
        sum += v;
    }
    // Step j of a word yields fields j, j + run/4, ...: channels 2j, 2j + run/2 and their successors.
    for (int i = 0; i < n; i += run) {
        for (int j = 0; j < run / 4; ++j) {
            q[i + 4 * j] = natural[i + 2 * j];
            q[i + 4 * j + 1] = natural[i + 2 * j + run / 2];
            q[i + 4 * j + 2] = natural[i + 2 * j + 1];
            q[i + 4 * j + 3] = natural[i + 2 * j + run / 2 + 1];
        }
    }
    const size_t at = size_t(row) * c.weight.n_blocks + b;
    c.x_scales[at] = peak * (1.0f / 127);
    c.x_sums[at] = sum;
}

template <class Isa>
void quantize(const Call& c, int row) {
    alignas(64) float x[kMaxBlock];
    for (int b = 0; b < c.weight.n_blocks; ++b) {
        const int k0 = c.weight.blocks[3 * b], n = c.weight.blocks[3 * b + 1] - k0;
        load_block<Isa>(c, row, k0, k0 + n, x);
        uint32_t largest = 0;  // magnitudes order like their bit patterns, infinities and NaN above all
        for (int i = 0; i < n; ++i) {
            const uint32_t magnitude = float_to_bits(x[i]) & 0x7fffffffu;
            largest = magnitude > largest ? magnitude : largest;
        }
        const bool finite = largest < 0x7f800000u;
        if (!finite) {
            for (int i = 0; i < n; ++i) x[i] = 0.0f;
            largest = 0;
        }
        if (c.a8) {
            quantize8(c, row, b, x, n, largest);
        } else {
            quantize16(c, row, b, x, n, largest);
        }
        // A row with an infinity or NaN comes out as NaN.
        if (!finite) c.x_scales[size_t(row) * c.planes * c.weight.n_blocks + b] = bits_to_float(0x7fc00000u);
    }
}

// -- weights -----------------------------------------------------------------------------------------------------

template <class Isa>
GPTQ_INLINE void load_scales(const Weight& w, int strip, int group, float* out) {
    const size_t at = (size_t(strip) * w.groups + group) * kStrip;
    to_float<Isa>(w.scales_dtype, static_cast<const char*>(w.scales) + at * size_of(w.scales_dtype), out, kStrip);
}

GPTQ_INLINE void load_zeros(const Weight& w, int strip, int group, int32_t* out) {
    const uint8_t* zeros = w.zeros + (size_t(strip) * w.groups + group) * kStrip;
    for (int i = 0; i < kStrip; ++i) out[i] = zeros[i];
}

template <int Bits>
GPTQ_INLINE const uint32_t* words_at(const Weight& w, int strip, int slot) {
    return w.words + (size_t(strip) * (w.slots / 32) + slot / 32) * Bits * kStrip +
           (Bits == 3 ? 0 : slot % 32 * Bits / 32 * kStrip);
}

// -- results -----------------------------------------------------------------------------------------------------

// sums: [Planes][16] float, `stride` floats apart.
template <class Isa, int Planes>
GPTQ_INLINE void finish(const Call& c, int m, int strip, const float* sums, int stride) {
    alignas(64) float y[kStrip];
    const int n0 = strip * kStrip;
    const int n = c.weight.out_features - n0 < kStrip ? c.weight.out_features - n0 : kStrip;
    for (int i = 0; i < kStrip; ++i) y[i] = sums[i];
    if constexpr (Planes == 2) {
        for (int i = 0; i < kStrip; ++i) y[i] += sums[stride + i];
    }
    if (c.bias) {
        alignas(64) float bias[kStrip] = {};
        to_float<Isa>(c.bias_dtype, static_cast<const char*>(c.bias) + size_t(n0) * size_of(c.bias_dtype), bias, n);
        for (int i = 0; i < kStrip; ++i) y[i] += bias[i];
    }
    if (c.y_rows) m = c.y_rows[m];
    from_float<Isa>(c.dtype, y, static_cast<char*>(c.y) + (size_t(m) * c.weight.out_features + n0) * size_of(c.dtype),
                    n);
}

// -- products --------------------------------------------------------------------------------------------------------

// Rows x Strips tiles of y. Codes are unpacked in registers, and used for all rows at once.
template <class Isa, int Bits, bool A8, int Rows, int Strips>
void multiply_tile(const Call& c, int m0, int strip) {
    using Vec = Vectors<Isa::lanes>;
    using U = typename Vec::U;
    using I = typename Vec::I;
    using F = typename Vec::F;
    using C = Codes<Bits, A8>;
    constexpr int Per = kStrip / Isa::lanes, V = Strips * Per;  // vectors of a strip, and of all
    // Chains of dependent sums: enough of them to hide the latency of dot.
    constexpr int Chains = Rows * V >= 8 ? 1 : (Rows * V >= 4 ? 2 : 4);
    constexpr int Splits = Chains < C::steps ? Chains : C::steps;
    constexpr bool InPlace = C::has_places(Splits);
    // Where dot yields sums of int16, these are widened before they overflow.
    constexpr bool Pairs = Isa::pairs && C::dot == Dot::i8_nibbles;
    const Weight& w = c.weight;
    const int row0 = m0 * c.planes;
    const size_t stride = c.lane_stride(), strip_words = size_t(w.slots / 32) * Bits * kStrip;
    F y[Rows][V] = {};
    for (int b = 0; b < w.n_blocks; ++b) {
        const int k0 = w.blocks[3 * b], k1 = w.blocks[3 * b + 1], group = w.blocks[3 * b + 2];
        I sums[Splits][Rows][V] = {};
        if (w.zeros) {
            alignas(64) int32_t zeros[Strips][kStrip];
            GPTQ_UNROLL for (int s = 0; s < Strips; ++s) load_zeros(w, strip + s, group, zeros[s]);
            GPTQ_UNROLL for (int r = 0; r < Rows; ++r) {
                const int32_t sum = -c.x_sums[size_t(row0 + r) * w.n_blocks + b];
                GPTQ_UNROLL for (int v = 0; v < V; ++v) {
                    sums[0][r][v] = Vec::template load<I>(&zeros[0][v * Isa::lanes]) * sum;
                }
            }
        } else {
            GPTQ_UNROLL for (int r = 0; r < Rows; ++r) {
                const int32_t sum = -c.x_sums[size_t(row0 + r) * w.n_blocks + b] * (1 << (Bits - 1));
                GPTQ_UNROLL for (int v = 0; v < V; ++v) sums[0][r][v] = sum - I{};
            }
        }
        const uint32_t* words = words_at<Bits>(w, strip, k0);
        const uint32_t* x = c.lanes + row0 * stride + k0 / C::per_lane;
        for (int k = k0; k < k1;) {
            I pairs[Splits][Rows][V] = {};
            I(&into)[Splits][Rows][V] = Pairs ? pairs : sums;
            const int end = Pairs && k1 - k > C::pairs ? k + C::pairs : k1;
            for (; k < end; k += C::run) {
                U word[V][C::words];
                GPTQ_UNROLL for (int i = 0; i < C::words; ++i) {
                    GPTQ_UNROLL for (int s = 0; s < Strips; ++s) {
                        const uint32_t* const from = words + s * strip_words + i * kStrip;
                        __builtin_prefetch(from + 128 * kStrip);  // 8 KB ahead: measured best
                        GPTQ_UNROLL for (int v = 0; v < Per; ++v) {
                            word[s * Per + v][i] = Vec::template load<U>(from + v * Isa::lanes);
                        }
                    }
                }
                GPTQ_UNROLL for (int j = 0; j < C::steps; ++j) {
                    U codes[V];
                    GPTQ_UNROLL for (int v = 0; v < V; ++v) {
                        codes[v] = InPlace ? C::step_in_place(word[v], j) : C::step(word[v], j);
                    }
                    GPTQ_UNROLL for (int r = 0; r < Rows; ++r) {
                        const U lanes = Vec::splat(x[r * stride + j]);
                        GPTQ_UNROLL for (int v = 0; v < V; ++v) {
                            I& sum = into[j % Splits][r][v];
                            sum = Isa::template dot<C::dot>(sum, codes[v], lanes);
                        }
                    }
                }
                words += C::words * kStrip;
                x += C::steps;
            }
            if constexpr (Pairs) {
                GPTQ_UNROLL for (int s = 0; s < Splits; ++s) {
                    GPTQ_UNROLL for (int r = 0; r < Rows; ++r) {
                        GPTQ_UNROLL for (int v = 0; v < V; ++v) sums[0][r][v] += Isa::widen(pairs[s][r][v]);
                    }
                }
            }
        }
        alignas(64) float scales[Strips][kStrip];
        GPTQ_UNROLL for (int s = 0; s < Strips; ++s) load_scales<Isa>(w, strip + s, group, scales[s]);
        GPTQ_UNROLL for (int r = 0; r < Rows; ++r) {
            const float x_scale = c.x_scales[size_t(row0 + r) * w.n_blocks + b];
            GPTQ_UNROLL for (int v = 0; v < V; ++v) {
                I sum = sums[0][r][v];
                GPTQ_UNROLL for (int s = 1; s < (Pairs ? 1 : Splits); ++s) sum +=
                    sums[s][r][v] >> (InPlace ? C::place(s) : 0);
                const F scale = Vec::template load<F>(&scales[0][v * Isa::lanes]) * x_scale;
                y[r][v] += __builtin_convertvector(sum, F) * scale;
            }
        }
    }
    alignas(64) float out[Rows][Strips * kStrip];
    GPTQ_UNROLL for (int r = 0; r < Rows; ++r) {
        GPTQ_UNROLL for (int v = 0; v < V; ++v) Vec::store(&out[r][v * Isa::lanes], y[r][v]);
    }
    for (int s = 0; s < Strips; ++s) {
        const auto sums = [&](int row) { return out[row] + s * kStrip; };
        if (Rows % 2 || c.planes == 1) {  // rows of two planes come in pairs
            for (int r = 0; r < Rows; ++r) finish<Isa, 1>(c, m0 + r, strip + s, sums(r), 0);
        } else {
            for (int r = 0; r < Rows; r += 2) finish<Isa, 2>(c, m0 + r / 2, strip + s, sums(r), Strips * kStrip);
        }
    }
}

// `rows` rows (with planes), at most Rows.
template <class Isa, int Bits, bool A8, int Rows>
GPTQ_INLINE void multiply_rows(const Call& c, int m0, int rows, int s0, int s1) {
    if constexpr (Rows > 1) {
        if (rows < Rows) return multiply_rows<Isa, Bits, A8, Rows - 1>(c, m0, rows, s0, s1);
    }
    int s = s0;
    if constexpr (Rows > Isa::rows / 2 && Isa::strips > 1) {
        for (; s + Isa::strips <= s1; s += Isa::strips) multiply_tile<Isa, Bits, A8, Rows, Isa::strips>(c, m0, s);
    }
    for (; s < s1; ++s) multiply_tile<Isa, Bits, A8, Rows, 1>(c, m0, s);
}

template <class Isa, int Bits, bool A8>
void multiply_as(const Call& c, int m0, int m1, int s0, int s1) {
    // As few groups of rows as registers allow, of about one size.
    const int most = Isa::rows / c.planes, groups = (m1 - m0 + most - 1) / most;
    for (int s = s0; s < s1; s += Isa::strips) {
        const int end = s + Isa::strips < s1 ? s + Isa::strips : s1;
        for (int i = 0, m = m0; i < groups; ++i) {
            const int rows = (m1 - m) / (groups - i);
            multiply_rows<Isa, Bits, A8, Isa::rows>(c, m, rows * c.planes, s, end);
            m += rows;
        }
    }
}

template <class Isa, bool A8>
void multiply_bits(const Call& c, int m0, int m1, int s0, int s1) {
    switch (c.weight.bits) {
        case 2:
            return multiply_as<Isa, 2, A8>(c, m0, m1, s0, s1);
        case 3:
            return multiply_as<Isa, 3, A8>(c, m0, m1, s0, s1);
        case 4:
            return multiply_as<Isa, 4, A8>(c, m0, m1, s0, s1);
        case 8:
            return multiply_as<Isa, 8, A8>(c, m0, m1, s0, s1);
    }
}

template <class Isa>
void multiply(const Call& c, int m0, int m1, int s0, int s1) {
    if (c.a8) {
        multiply_bits<Isa, true>(c, m0, m1, s0, s1);
    } else {
        multiply_bits<Isa, false>(c, m0, m1, s0, s1);
    }
}

}  // namespace
}  // namespace gptq
