#include "isa_x86.h"

namespace gptq {
namespace {

struct AvxVnni : Wide256 {
    static constexpr int rows = 6;

    template <Dot Kind>
    static GPTQ_INLINE I dot(I sum, U codes, U x) {
        if constexpr (Kind == Dot::i16) return I(_mm256_dpwssd_avx_epi32(__m256i(sum), __m256i(codes), __m256i(x)));
        return I(_mm256_dpbusd_avx_epi32(__m256i(sum), __m256i(codes), __m256i(x)));
    }
};

}  // namespace

const Level level_avx_vnni = {"avx_vnni",        quantize<AvxVnni>,    multiply<AvxVnni>,
                              gradient<AvxVnni>, look_up_row<AvxVnni>, &row_kernels<AvxVnni>};

}  // namespace gptq
