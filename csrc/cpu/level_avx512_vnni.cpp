#include "isa_x86.h"

namespace gptq {
namespace {

struct Avx512Vnni : Wide512 {
    template <Dot Kind>
    static GPTQ_INLINE I dot(I sum, U codes, U x) {
        if constexpr (Kind == Dot::i16) return I(_mm512_dpwssd_epi32(__m512i(sum), __m512i(codes), __m512i(x)));
        return I(_mm512_dpbusd_epi32(__m512i(sum), __m512i(codes), __m512i(x)));
    }
};

}  // namespace

const Level level_avx512_vnni = {"avx512_vnni",        quantize<Avx512Vnni>,    multiply<Avx512Vnni>,
                                 gradient<Avx512Vnni>, look_up_row<Avx512Vnni>, &row_kernels<Avx512Vnni>};

}  // namespace gptq
