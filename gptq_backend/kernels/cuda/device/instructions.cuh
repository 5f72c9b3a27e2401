// The instructions that the kernels use, each as one function, without a header of CUDA's: NVRTC has none beside it.
// The host's compiler gets the same functions from emulator.h (tests/kernels/cuda_emulator), which runs the kernels
// thread by thread.
#pragma once
#include "arguments.h"

namespace gptq {

// Tags for what the matrix units multiply.
struct F16 {};
struct BF16 {};

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

}  // namespace gptq

// ENTRY(name, parameters) { ... } is a kernel that the host finds by its name. LIMITED_ENTRY: with at most so many
// threads, of which `blocks` blocks find registers in a multiprocessor.
#ifndef __CUDACC__
#define DEVICE inline
#include "emulator.h"
#else
#define DEVICE __device__ __forceinline__
#define ENTRY(name, parameters) extern "C" __global__ void name parameters
#define LIMITED_ENTRY(threads, blocks, name, parameters) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name parameters

namespace gptq {

#if __CUDA_ARCH__ >= 800
constexpr int kBlockSharedBytes = kSharedBytes;
#else
constexpr int kBlockSharedBytes = kTuringSharedBytes;
#endif

// d = (a & b) | c
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}

__device__ __forceinline__ uint32_t rotate_right(uint32_t a, uint32_t by) {
    return __funnelshift_r(a, a, by);
}

__device__ __forceinline__ float as_float(uint32_t bits) {
    return __uint_as_float(bits);
}
__device__ __forceinline__ uint32_t as_bits(float value) {
    return __float_as_uint(value);
}

__device__ __forceinline__ float f16_to_float(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ __forceinline__ uint16_t float_to_f16(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
__device__ __forceinline__ float bf16_to_float(uint16_t bits) {
    return __uint_as_float(uint32_t(bits) << 16);
}
__device__ __forceinline__ uint16_t float_to_bf16(float value) {
#if __CUDA_ARCH__ >= 800
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    const uint32_t bits = as_bits(value);
    if (value != value) return 0x7FFF;
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
#endif
}

// Lane by lane difference of two packed 16-bit floats; exact where it is used.
template <class T>
__device__ __forceinline__ uint32_t subtract2(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t subtract2<F16>(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
template <>
__device__ __forceinline__ uint32_t subtract2<BF16>(uint32_t a, uint32_t b) {
    uint32_t d = 0;
#if __CUDA_ARCH__ >= 800
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(b), "r"(0xBF80BF80u), "r"(a));  // b * -1 + a
#endif
    return d;
}

// Lane by lane a b + c of packed fp16; exact where it is used.
__device__ __forceinline__ uint32_t multiply_add2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// d = a b + c, with a 16x16 and b 16x8, in the register layout of mma.m16n8k16 (PTX ISA, "Matrix Fragments for
// mma.m16n8k16"). bf16 needs sm_80; the host never launches it below.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                    const float (&c)[4]);
template <>
__device__ __forceinline__ void mma<F16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         const float (&c)[4]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}
template <>
__device__ __forceinline__ void mma<BF16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                          const float (&c)[4]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#endif
}

// Words of weights, read once: past the L1 cache.
template <int Words>
__device__ __forceinline__ void load_streaming(uint32_t* to, const uint32_t* from) {
    static_assert(Words == 1 || Words == 2 || Words == 4);
    if constexpr (Words == 4)
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "l"(from));
    else if constexpr (Words == 2)
        asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from));
    else
        asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(to[0]) : "l"(from));
}

// Values that other blocks read too.
template <class T>
__device__ __forceinline__ T load_cached(const T* from) {
    return __ldg(from);
}

// 16 bytes from global to shared memory without passing through registers (before sm_80: through them); zeros instead
// unless `valid`, and then `from` is not read.
__device__ __forceinline__ void copy16(void* to_shared, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
#else
    *static_cast<uint4*>(to_shared) = valid ? __ldg(static_cast<const uint4*>(from)) : uint4{0, 0, 0, 0};
#endif
}
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Wait until at most `Pending` of this thread's groups are under way.
template <int Pending>
__device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// A value that all lanes of a warp have, so that the compiler knows that branches on it do not diverge.
__device__ __forceinline__ int uniform(int value) {
    asm volatile("shfl.sync.idx.b32 %0, %0, 0, 31, -1;" : "+r"(value));
    return value;
}

// Stays in a register: the compiler would compute it again at each use, to spare registers that are free.
__device__ __forceinline__ int kept(int value) {
    asm volatile("" : "+r"(value));
    return value;
}
template <class T>
__device__ __forceinline__ T* kept(T* value) {
    asm volatile("" : "+l"(value));
    return value;
}

__device__ __forceinline__ void synchronize_block() {
    __syncthreads();
}

__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

}  // namespace gptq
#endif
