// What the x86 levels share.
#pragma once

#include <immintrin.h>

#include "kernel_impl.h"

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
    static constexpr int lanes = 8, row_tile = 6, strip_tile = 1;
    using U = Vectors<lanes>::U;
    using I = Vectors<lanes>::I;
};

struct Wide512 : F16C {
    static constexpr int lanes = 16, row_tile = 6, strip_tile = 4;
    using U = Vectors<lanes>::U;
    using I = Vectors<lanes>::I;
};

}  // namespace
}  // namespace gptq
