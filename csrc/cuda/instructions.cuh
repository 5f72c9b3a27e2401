// The instructions that the kernels use, each as one function. A compiler that is not nvcc gets the same functions from
// emulator.h (tests/kernels/cuda_emulator), which runs the kernels thread by thread on the host.
#pragma once
#include <type_traits>

#include "api.h"

namespace gptq {

// Tags for what the matrix units multiply.
struct F16 {};
struct BF16 {};

}  // namespace gptq

#ifndef __CUDACC__
#define DEVICE inline
#define GLOBAL inline
#include "emulator.h"
#else
#define DEVICE __device__ __forceinline__
#define GLOBAL __global__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace gptq {

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
    return __half2float(__ushort_as_half(bits));
}
__device__ __forceinline__ uint16_t float_to_f16(float value) {
    return __half_as_ushort(__float2half_rn(value));
}
__device__ __forceinline__ float bf16_to_float(uint16_t bits) {
    return __uint_as_float(uint32_t(bits) << 16);
}
__device__ __forceinline__ uint16_t float_to_bf16(float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
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

// c += a b, with a 16x16 and b 16x8, in the register layout of mma.m16n8k16 (PTX ISA, "Matrix Fragments for
// mma.m16n8k16"). bf16 needs sm_80; the host never launches it below.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma<F16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}
template <>
__device__ __forceinline__ void mma<BF16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
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

__device__ __forceinline__ void synchronize_block() {
    __syncthreads();
}

__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline void use_device(int device) {
    check(cudaSetDevice(device), "cudaSetDevice");
}

// Empty, or why the device cannot run Kernel.
template <auto Kernel>
std::string unfit_kernel(int device) {
    cudaFuncAttributes attributes;
    cudaError_t status = cudaSetDevice(device);
    if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, Kernel);
    if (status == cudaSuccess) return "";
    cudaGetLastError();  // clear it
    const std::string reason = std::string("the CUDA extension does not run here: ") + cudaGetErrorString(status);
    if (status != cudaErrorNoKernelImageForDevice && status != cudaErrorInvalidDeviceFunction) return reason;
    return reason + "; install again with GPTQ_BACKEND_CUDA_ARCHS set to this GPU's architecture";
}

// One launch on the device in use.
template <auto Kernel, class... Args>
void launch(dim3 grid, int threads, size_t shared_bytes, void* stream, const Args&... args) {
    if (shared_bytes > 48 * 1024) {
        static std::atomic<uint64_t> allowed{0};  // a bit per device
        int device = 0;
        check(cudaGetDevice(&device), "cudaGetDevice");
        const uint64_t bit = uint64_t{1} << (device % 64);
        if (!(allowed.load() & bit)) {
            int limit = 0;
            check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
            check(cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit), "shared memory");
            allowed |= bit;
        }
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    check(cudaLaunchKernelEx(&config, Kernel, args...), "kernel launch");
}

}  // namespace gptq
#endif
