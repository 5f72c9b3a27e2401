#include "isa_x86.h"

namespace gptq {
namespace {

struct Avx2 : Wide256 {
    static GPTQ_INLINE I madd(U a, U b) { return I(_mm256_madd_epi16(__m256i(a), __m256i(b))); }
    static GPTQ_INLINE U maddubs(U a, U b) { return U(_mm256_maddubs_epi16(__m256i(a), __m256i(b))); }
    static GPTQ_INLINE U add16(U a, U b) { return U(_mm256_add_epi16(__m256i(a), __m256i(b))); }
};

}  // namespace

const Level level_avx2 = {"avx2",
                          quantize<Madd<Avx2>>,
                          multiply<Madd<Avx2>>,
                          gradient<Madd<Avx2>>,
                          look_up_row<Madd<Avx2>>,
                          &row_kernels<Madd<Avx2>>};

}  // namespace gptq
