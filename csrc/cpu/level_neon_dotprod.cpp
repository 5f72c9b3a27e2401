// ARMv8.2 with dot products of int8, e.g. Cortex-A76, Neoverse N1.
#include "isa_neon.h"

namespace gptq {
namespace {

struct NeonDotprod : Wide128 {
    template <Dot Kind>
    static GPTQ_INLINE I dot(I sum, U codes, U x) {
        if constexpr (Kind == Dot::i16) return dot16(sum, codes, x);
        const int8x16_t b = int8x16_t(x);
        if constexpr (Kind == Dot::i8_nibbles) return I(vdotq_s32(int32x4_t(sum), int8x16_t(codes), b));
        // Both factors are signed: the codes' highest bit is counted apart.
        const int8x16_t low = int8x16_t(codes & 0x7f7f7f7fu), high = int8x16_t((codes >> 7) & 0x01010101u);
        return I(vdotq_s32(int32x4_t(sum), low, b)) + (I(vdotq_s32(vdupq_n_s32(0), high, b)) << 7);
    }
};

}  // namespace

const Level level_neon_dotprod = {"neon_dotprod",        quantize<NeonDotprod>,    multiply<NeonDotprod>,
                                  gradient<NeonDotprod>, look_up_row<NeonDotprod>, &row_kernels<NeonDotprod>};

}  // namespace gptq
