// What a module holds: every kernel for codes of GPTQ_BITS bits. csrc/cuda/modules.cpp asks for them by these names.
#include "kernels.cuh"

#define JOIN(kind, bits, type) gptq_##kind##_##bits##_##type
#define NAMED(kind, bits, type) JOIN(kind, bits, type)
#define NAME(kind, type) NAMED(kind, GPTQ_BITS, type)

namespace gptq {

// Strips and blocks of 8 tokens; threads of a block at most, and how many such blocks have to find their registers in a
// multiprocessor.
#define SKINNY(strips, tokens, threads, blocks, T, type)                                  \
    LIMITED_ENTRY(threads, blocks, NAME(skinny_##strips##_##tokens, type), (Product p)) { \
        skinny<GPTQ_BITS, T, strips, tokens>(p);                                          \
    }
#define WIDE(tokens, T, type)                       \
    ENTRY(NAME(wide_##tokens, type), (Product p)) { \
        wide<GPTQ_BITS, T, tokens>(p);              \
    }

#define PRODUCTS(T, type)                                                \
    SKINNY(1, 1, 512, 1, T, type)                                        \
    SKINNY(1, 2, 256, 1, T, type)                                        \
    SKINNY(2, 1, 256, GPTQ_BITS == 2 || GPTQ_BITS == 4 ? 2 : 1, T, type) \
    SKINNY(2, 2, 256, 1, T, type)                                        \
    WIDE(2, T, type)                                                     \
    WIDE(4, T, type)                                                     \
    WIDE(8, T, type)                                                     \
    ENTRY(NAME(reduce, type), (Product p, int splits)) {                 \
        reduce<T>(p, splits);                                            \
    }

#define DEQUANTIZE(T, type)                                                                           \
    ENTRY(NAME(dequantize, type), (Weight w, int first_strip, int channels, int columns, void* to)) { \
        dequantize<GPTQ_BITS, T>(w, first_strip, channels, columns, to);                              \
    }

#define GATHER(T, type)                                                                           \
    ENTRY(NAME(gather, type), (const T* x, const int32_t* perm, T* to, int columns, int slots)) { \
        gather<T>(x, perm, to, columns, slots);                                                   \
    }

PRODUCTS(F16, f16)
PRODUCTS(BF16, bf16)
DEQUANTIZE(float, f32)
DEQUANTIZE(F16, f16)
DEQUANTIZE(BF16, bf16)
GATHER(uint16_t, 2)
GATHER(uint32_t, 4)

}  // namespace gptq
