#include "isa_x86.h"

namespace gptq {
namespace {

struct Avx512 : Wide512 {
    static GPTQ_INLINE I dot16(I sum, U codes, U x) { return sum + I(_mm512_madd_epi16(__m512i(codes), __m512i(x))); }
    template <int Bits>
    static GPTQ_INLINE I dot8(I sum, U codes, U x) {
        const __m512i ones = _mm512_set1_epi16(1);
        if constexpr (Bits < 8) {
            return sum + I(_mm512_madd_epi16(_mm512_maddubs_epi16(__m512i(codes), __m512i(x)), ones));
        }
        const __m512i low = _mm512_maddubs_epi16(__m512i(codes & 0x0f0f0f0fu), __m512i(x));
        const __m512i high = _mm512_maddubs_epi16(__m512i((codes >> 4) & 0x0f0f0f0fu), __m512i(x));
        return sum + I(_mm512_madd_epi16(low, ones)) + I(_mm512_madd_epi16(high, _mm512_set1_epi16(16)));
    }
};

}  // namespace

const Level level_avx512 = {"avx512", quantize<Avx512>, multiply<Avx512>};

}  // namespace gptq
