// ARMv8.6 and its like, which also multiply uint8 by int8: Apple M2, Neoverse V1 and N2.
#include "isa_neon.h"

namespace gptq {
namespace {

struct NeonI8mm : Wide128 {
    template <Dot Kind>
    static GPTQ_INLINE I dot(I sum, U codes, U x) {
        if constexpr (Kind == Dot::i16) return dot16(sum, codes, x);
        return I(vusdotq_s32(int32x4_t(sum), uint8x16_t(codes), int8x16_t(x)));
    }
};

}  // namespace

const Level level_neon_i8mm = {"neon_i8mm",        quantize<NeonI8mm>,    multiply<NeonI8mm>,
                               gradient<NeonI8mm>, look_up_row<NeonI8mm>, &row_kernels<NeonI8mm>};

}  // namespace gptq
