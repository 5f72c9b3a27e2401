// What the ARM levels share.
#pragma once

#include <arm_neon.h>

#include "gradient_impl.h"
#include "lookup_impl.h"
#include "rows_impl.h"

namespace gptq {
namespace {

struct Wide128 {
    static constexpr int lanes = 4, rows = 4, strips = 1, gradient_rows = 4, gradient_columns = 1;
    static constexpr bool pairs = false;
    using U = Vectors<lanes>::U;
    using I = Vectors<lanes>::I;

    // Products of pairs of int16, which every ARM of 64 bits has.
    static GPTQ_INLINE I dot16(I sum, U codes, U x) {
        const int16x8_t a = int16x8_t(codes), b = int16x8_t(x);
        return sum + I(vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b)));
    }

    using F = Vectors<lanes>::F;

    static GPTQ_INLINE F load_f16(const void* in) {
        return F(vcvt_f32_f16(float16x4_t(vld1_u16(static_cast<const uint16_t*>(in)))));
    }
    static GPTQ_INLINE F load_bf16(const void* in) {
        return F(vshll_n_u16(vld1_u16(static_cast<const uint16_t*>(in)), 16));
    }
    static void half_to_float(const uint16_t* in, float* out, int n) {
        int i = 0;
        for (; i + 4 <= n; i += 4) vst1q_f32(out + i, vcvt_f32_f16(float16x4_t(vld1_u16(in + i))));
        for (; i < n; ++i) out[i] = vgetq_lane_f32(vcvt_f32_f16(float16x4_t(vdup_n_u16(in[i]))), 0);
    }
    static void float_to_half(const float* in, uint16_t* out, int n) {
        int i = 0;
        for (; i + 4 <= n; i += 4) vst1_u16(out + i, uint16x4_t(vcvt_f16_f32(vld1q_f32(in + i))));
        for (; i < n; ++i) out[i] = vget_lane_u16(uint16x4_t(vcvt_f16_f32(vdupq_n_f32(in[i]))), 0);
    }
};

}  // namespace
}  // namespace gptq
