// What differs between Linux, macOS and Windows, and between CPUs of one kind. No other file asks which system it is.
#include "platform.h"

#include <cstdint>

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <time.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/mman.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace gptq {

// -- the CPU

#if defined(__x86_64__)
namespace {

struct Registers {
    unsigned a = 0, b = 0, c = 0, d = 0;
};

// All zeros for a leaf that the CPU lacks.
Registers cpuid(unsigned leaf, unsigned part) {
    Registers found;
    __get_cpuid_count(leaf, part, &found.a, &found.b, &found.c, &found.d);
    return found;
}

bool all(unsigned word, unsigned bits) {
    return (word & bits) == bits;
}

// Which registers the system saves when threads change, by the bits of XCR0.
unsigned saved_registers() {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

constexpr unsigned bit(int i) {
    return 1u << i;
}

}  // namespace

// Not __builtin_cpu_supports: on Windows clang does not link what it needs, and its names depend on the version.
Features cpu_features() {
    const Registers basic = cpuid(1, 0), more = cpuid(7, 0), later = more.a >= 1 ? cpuid(7, 1) : Registers();
    const unsigned saved = all(basic.c, bit(27) | bit(28)) ? saved_registers() : 0;  // OSXSAVE, AVX
#if defined(__APPLE__)
    const bool wide = true;  // macOS saves the registers of AVX-512 from their first use on, and only then says so
#else
    const bool wide = all(saved, bit(5) | bit(6) | bit(7));
#endif
    Features found{};
    found.avx2 = all(saved, bit(1) | bit(2)) && all(more.b, bit(5)) && all(basic.c, bit(12) | bit(29));  // FMA, F16C
    found.avx_vnni = found.avx2 && all(later.a, bit(4));
    found.avx512 = found.avx2 && wide && all(more.b, bit(16) | bit(17) | bit(30) | bit(31));  // F, DQ, BW, VL
    found.avx512_vnni = found.avx512 && all(more.c, bit(11));
    return found;
}
#elif defined(__aarch64__) && defined(__APPLE__)
namespace {

bool has(const char* feature) {
    int found = 0;
    size_t size = sizeof found;
    return !sysctlbyname(feature, &found, &size, nullptr, 0) && found;
}

}  // namespace

Features cpu_features() {
    Features found{};
    found.neon = true;
    found.neon_dotprod = has("hw.optional.arm.FEAT_DotProd");
    found.neon_i8mm = found.neon_dotprod && has("hw.optional.arm.FEAT_I8MM");
    return found;
}
#elif defined(__aarch64__) && defined(__linux__)
// Bits of Linux's interface, which older headers do not name.
Features cpu_features() {
    Features found{};
    found.neon = true;
    found.neon_dotprod = getauxval(AT_HWCAP) >> 20 & 1;                      // HWCAP_ASIMDDP
    found.neon_i8mm = found.neon_dotprod && getauxval(AT_HWCAP2) >> 13 & 1;  // HWCAP2_I8MM
    return found;
}
#else
// Of a system that is not known here: what every CPU of the kind has.
Features cpu_features() {
    Features found{};
#ifdef __aarch64__
    found.neon = true;
#endif
    return found;
}
#endif

// -- the system

#if defined(_WIN32)
// Windows counts a thread's time in steps of 16 ms, which regions of microseconds would take for lost. So here a thread
// counts as never put aside.
double thread_seconds() {
    LARGE_INTEGER now, per_second;
    QueryPerformanceCounter(&now);
    QueryPerformanceFrequency(&per_second);
    return double(now.QuadPart) / double(per_second.QuadPart);
}
#else
double thread_seconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}
#endif

#if defined(__linux__)
void advise_huge_pages(void* data, size_t bytes) {
    const uintptr_t page = 2 << 20, start = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
    if (end > start) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
}
#else
void advise_huge_pages(void*, size_t) {}
#endif

}  // namespace gptq
