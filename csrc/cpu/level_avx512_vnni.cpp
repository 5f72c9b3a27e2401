#include "isa_x86.h"

namespace gptq {
namespace {

struct Avx512Vnni : Wide512 {
    static GPTQ_INLINE I dot16(I sum, U codes, U x) {
        return I(_mm512_dpwssd_epi32(__m512i(sum), __m512i(codes), __m512i(x)));
    }
    template <int Bits>
    static GPTQ_INLINE I dot8(I sum, U codes, U x) {
        return I(_mm512_dpbusd_epi32(__m512i(sum), __m512i(codes), __m512i(x)));
    }
};

}  // namespace

const Level level_avx512_vnni = {"avx512_vnni", quantize<Avx512Vnni>, multiply<Avx512Vnni>};

}  // namespace gptq
