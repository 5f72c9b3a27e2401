// Any CPU: the compiler lowers the vector types to what the baseline has. Same geometry as AVX-512.
#include "gradient_impl.h"
#include "lookup_impl.h"
#include "rows_impl.h"

namespace gptq {
namespace {

struct Generic {
    static constexpr int lanes = 16, rows = 4, strips = 1, gradient_rows = 2, gradient_columns = 1;
    static constexpr bool pairs = false;
    using U = Vectors<lanes>::U;
    using I = Vectors<lanes>::I;

    template <Dot Kind>
    static I dot(I sum, U codes, U x) {
        constexpr int width = Kind == Dot::i16 ? 16 : 8;
        for (int shift = 0; shift < 32; shift += width) {
            const auto with_sign = [shift](U v) { return I(v << (32 - width - shift)) >> (32 - width); };
            const I code = Kind == Dot::i16 ? with_sign(codes) : I((codes >> shift) & ((1u << width) - 1));
            sum += code * with_sign(x);
        }
        return sum;
    }
    using F = Vectors<lanes>::F;

    static F load_f16(const void* in) {
        uint16_t halves[lanes];
        float floats[lanes];
        __builtin_memcpy(halves, in, sizeof halves);
        half_to_float(halves, floats, lanes);
        return Vectors<lanes>::load<F>(floats);
    }
    static F load_bf16(const void* in) {
        typedef uint16_t Bits __attribute__((vector_size(lanes * 2)));
        return F(__builtin_convertvector(Vectors<lanes>::load<Bits>(in), U) << 16);
    }
    static void half_to_float(const uint16_t* in, float* out, int n) {
        for (int i = 0; i < n; ++i) {
            const uint32_t sign = uint32_t(in[i] & 0x8000u) << 16, rest = in[i] & 0x7fffu;
            // Moving the exponent by multiplication gets subnormal numbers right as well.
            const float scaled = bits_to_float(rest << 13) * bits_to_float((254 - 15) << 23);
            const uint32_t special = rest >= 0x7c00u ? 0x7f800000u | (rest << 13) : float_to_bits(scaled);
            out[i] = bits_to_float(sign | special);
        }
    }
    static void float_to_half(const float* in, uint16_t* out, int n) {
        for (int i = 0; i < n; ++i) {
            const uint32_t bits = float_to_bits(in[i]), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
            uint32_t half;
            if (rest >= 0x47800000u) {  // 65536 and more, infinity, NaN
                half = rest > 0x7f800000u ? 0x7e00u : 0x7c00u;
            } else if (rest < 0x38800000u) {  // subnormal: the addition rounds to multiples of 2^-24
                half = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u;
            } else {
                half = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1)) >> 13;
            }
            out[i] = uint16_t(sign | half);
        }
    }
};

}  // namespace

const Level level_generic = {"generic",         quantize<Generic>,    multiply<Generic>,
                             gradient<Generic>, look_up_row<Generic>, &row_kernels<Generic>};

}  // namespace gptq
