#include "isa_x86.h"

namespace gptq {
namespace {

struct Avx2 : Wide256 {
    static GPTQ_INLINE I dot16(I sum, U codes, U x) { return sum + I(_mm256_madd_epi16(__m256i(codes), __m256i(x))); }
    template <int Bits>
    static GPTQ_INLINE I dot8(I sum, U codes, U x) {
        const __m256i ones = _mm256_set1_epi16(1);
        if constexpr (Bits < 8) {
            return sum + I(_mm256_madd_epi16(_mm256_maddubs_epi16(__m256i(codes), __m256i(x)), ones));
        }
        // 255 * 127 * 2 does not fit 16 bits: take the codes nibble by nibble.
        const __m256i low = _mm256_maddubs_epi16(__m256i(codes & 0x0f0f0f0fu), __m256i(x));
        const __m256i high = _mm256_maddubs_epi16(__m256i((codes >> 4) & 0x0f0f0f0fu), __m256i(x));
        return sum + I(_mm256_madd_epi16(low, ones)) + I(_mm256_madd_epi16(high, _mm256_set1_epi16(16)));
    }
};

}  // namespace

const Level level_avx2 = {"avx2", quantize<Avx2>, multiply<Avx2>};

}  // namespace gptq
