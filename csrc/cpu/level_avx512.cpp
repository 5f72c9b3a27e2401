#include "isa_x86.h"

namespace gptq {
namespace {

struct Avx512 : Wide512 {
    static GPTQ_INLINE I madd(U a, U b) { return I(_mm512_madd_epi16(__m512i(a), __m512i(b))); }
    static GPTQ_INLINE U maddubs(U a, U b) { return U(_mm512_maddubs_epi16(__m512i(a), __m512i(b))); }
    static GPTQ_INLINE U add16(U a, U b) { return U(_mm512_add_epi16(__m512i(a), __m512i(b))); }
};

}  // namespace

const Level level_avx512 = {"avx512",
                            quantize<Madd<Avx512>>,
                            multiply<Madd<Avx512>>,
                            gradient<Madd<Avx512>>,
                            look_up_row<Madd<Avx512>>,
                            &row_kernels<Madd<Avx512>>};

}  // namespace gptq
