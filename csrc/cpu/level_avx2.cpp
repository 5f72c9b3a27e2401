#include "isa_x86.h"

namespace gptq {
namespace {

struct Avx2 : Wide256 {
    template <Dot Kind>
    static GPTQ_INLINE I dot(I sum, U codes, U x) {
        const __m256i ones = _mm256_set1_epi16(1), q = __m256i(codes), v = __m256i(x);
        if constexpr (Kind == Dot::i16) return in_order(sum + I(_mm256_madd_epi16(q, v)));
        if constexpr (Kind == Dot::i8_nibbles) {
            return in_order(sum + I(_mm256_madd_epi16(_mm256_maddubs_epi16(q, v), ones)));
        }
        // 255 * 127 * 2 does not fit 16 bits: nibble by nibble.
        const __m256i low = _mm256_maddubs_epi16(__m256i(codes & 0x0f0f0f0fu), v);
        const __m256i high = _mm256_maddubs_epi16(__m256i((codes >> 4) & 0x0f0f0f0fu), v);
        return in_order(sum + I(_mm256_madd_epi16(low, ones)) + I(_mm256_madd_epi16(high, _mm256_set1_epi16(16))));
    }
};

}  // namespace

const Level level_avx2 = {"avx2", quantize<Avx2>, multiply<Avx2>};

}  // namespace gptq
