// What the x86 levels share.
#pragma once

#include <immintrin.h>

#include "gradient_impl.h"
#include "lookup_impl.h"
#include "rows_impl.h"

namespace gptq {
namespace {

// Keeps GCC from regrouping a long sum: it would compute all its terms first and spill them.
template <class V>
GPTQ_INLINE V in_order(V sum) {
    asm("" : "+v"(sum));
    return sum;
}

struct F16C {
    static void half_to_float(const uint16_t* in, float* out, int n) {
        int i = 0;
        for (; i + 8 <= n; i += 8) {
            _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
        }
        for (; i < n; ++i) out[i] = _cvtsh_ss(in[i]);
    }
    static void float_to_half(const float* in, uint16_t* out, int n) {
        int i = 0;
        for (; i + 8 <= n; i += 8) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
        }
        for (; i < n; ++i) out[i] = _cvtss_sh(in[i], 0);
    }
};

struct Wide256 : F16C {
    static constexpr int lanes = 8, rows = 4, strips = 1, gradient_rows = 6, gradient_columns = 1;
    static constexpr bool pairs = false;
    using U = Vectors<lanes>::U;
    using I = Vectors<lanes>::I;

    using F = Vectors<lanes>::F;

    static GPTQ_INLINE F load_f16(const void* in) {
        return F(_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(in))));
    }
    static GPTQ_INLINE F load_bf16(const void* in) {
        return F(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(in))), 16));
    }
};

struct Wide512 : F16C {
    static constexpr int lanes = 16, rows = 8, strips = 2, gradient_rows = 6, gradient_columns = 4;
    static constexpr bool pairs = false;
    using U = Vectors<lanes>::U;
    using I = Vectors<lanes>::I;

    using F = Vectors<lanes>::F;

    // Every lane is written, but GCC warns of the undefined ones that the form without a mask names.
    static GPTQ_INLINE F load_f16(const void* in) {
        return F(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(in))));
    }
    static GPTQ_INLINE F load_bf16(const void* in) {
        const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(in)));
        return F(_mm512_maskz_slli_epi32(0xffff, wide, 16));
    }
};

// Products without VNNI, from the two instructions that a level names: madd adds pairs of int16 products to int32,
// maddubs pairs of uint8 * int8 to int16.
template <class Isa>
struct Madd : Isa {
    using typename Isa::I;
    using typename Isa::U;
    static constexpr bool pairs = true;

    static GPTQ_INLINE I widen(I sums) { return Isa::madd(U(sums), Vectors<Isa::lanes>::splat(0x00010001u)); }
    template <Dot Kind>
    static GPTQ_INLINE I dot(I sum, U codes, U x) {
        const auto times = [](U pairs, uint32_t factor) {
            return Isa::madd(pairs, Vectors<Isa::lanes>::splat(factor << 16 | factor));
        };
        if constexpr (Kind == Dot::i16) return in_order(sum + Isa::madd(codes, x));
        if constexpr (Kind == Dot::i8_nibbles) return in_order(I(Isa::add16(U(sum), Isa::maddubs(codes, x))));
        // 255 * 127 * 2 does not fit 16 bits: nibble by nibble.
        const U low = Isa::maddubs(codes & 0x0f0f0f0fu, x), high = Isa::maddubs((codes >> 4) & 0x0f0f0f0fu, x);
        return in_order(sum + times(low, 1) + times(high, 16));
    }
};

}  // namespace
}  // namespace gptq
