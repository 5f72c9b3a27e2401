// Any ARM of 64 bits.
#include "isa_neon.h"

namespace gptq {
namespace {

struct Neon : Wide128 {
    template <Dot Kind>
    static GPTQ_INLINE I dot(I sum, U codes, U x) {
        if constexpr (Kind == Dot::i16) return dot16(sum, codes, x);
        const int8x16_t b = int8x16_t(x);
        if constexpr (Kind == Dot::i8_nibbles) {  // 2 * 15 * 127 fits 16 bits
            const int8x16_t a = int8x16_t(codes);
            const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
            return I(vpadalq_s16(int32x4_t(sum), vpaddq_s16(low, high)));
        }
        // 255 * 127 fits 16 bits, two of them do not.
        const uint8x16_t a = uint8x16_t(codes);
        const auto times = [](uint8x8_t code, int8x8_t value) {
            return vpaddlq_s16(vmulq_s16(int16x8_t(vmovl_u8(code)), vmovl_s8(value)));
        };
        const int32x4_t low = times(vget_low_u8(a), vget_low_s8(b)), high = times(vget_high_u8(a), vget_high_s8(b));
        return sum + I(vpaddq_s32(low, high));
    }
};

}  // namespace

const Level level_neon = {"neon",         quantize<Neon>,    multiply<Neon>,
                          gradient<Neon>, look_up_row<Neon>, &row_kernels<Neon>};

}  // namespace gptq
