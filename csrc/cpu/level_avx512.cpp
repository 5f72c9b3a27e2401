#include "isa_x86.h"

namespace gptq {
namespace {

struct Avx512 : Wide512 {
    template <Dot Kind>
    static GPTQ_INLINE I dot(I sum, U codes, U x) {
        const __m512i ones = _mm512_set1_epi16(1), q = __m512i(codes), v = __m512i(x);
        if constexpr (Kind == Dot::i16) return in_order(sum + I(_mm512_madd_epi16(q, v)));
        if constexpr (Kind == Dot::i8_nibbles) {
            return in_order(sum + I(_mm512_madd_epi16(_mm512_maddubs_epi16(q, v), ones)));
        }
        // 255 * 127 * 2 does not fit 16 bits: nibble by nibble.
        const __m512i low = _mm512_maddubs_epi16(__m512i(codes & 0x0f0f0f0fu), v);
        const __m512i high = _mm512_maddubs_epi16(__m512i((codes >> 4) & 0x0f0f0f0fu), v);
        return in_order(sum + I(_mm512_madd_epi16(low, ones)) + I(_mm512_madd_epi16(high, _mm512_set1_epi16(16))));
    }
};

}  // namespace

const Level level_avx512 = {"avx512", quantize<Avx512>, multiply<Avx512>};

}  // namespace gptq
