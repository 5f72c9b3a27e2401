// A host's version of device/instructions.cuh: the kernels, unchanged, one fiber per CUDA thread.
//
// What it is strict about: shared memory starts as NaN, asynchronous copies land either at once or only when they are
// waited for, warps run in a shuffled order between barriers (both by `seed`), and matrix instructions are computed
// from the 32 lanes' registers as the PTX ISA lays them out. Every access goes to the caller's memory, so a sanitizer
// sees it.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

struct uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Declares the kernel, lists it by its name, and begins its definition.
#define ENTRY(name, parameters) LISTED(name, parameters)  // which expands the name
#define LIMITED_ENTRY(threads, blocks, name, parameters) ENTRY(name, parameters)
#define LISTED(name, parameters)                                   \
    extern "C" void name parameters;                               \
    static const bool listed_##name = emulator::add(#name, &name); \
    extern "C" void name parameters

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

inline uint64_t seed = 0;
inline size_t shared_limit = 227 * 1024;

struct Copy {
    void* to;
    const void* from;
    bool valid;
};

// What a lane puts before the others of its warp.
struct Deposit {
    uint32_t a[4], b[2];
    float c[4];
};

// All threads of a block or a warp wait here for each other.
struct Barrier {
    int present = 0;  // threads that have not returned
    int waiting = 0;
    uint64_t opened = 0;  // times

    void open_if_complete() {
        if (waiting == 0 || waiting < present) return;
        waiting = 0;
        ++opened;
    }
};

struct Fiber {
    ucontext_t start;
    jmp_buf here;
    std::unique_ptr<char[]> stack;
    bool started = false, done = false;
    Barrier* barrier = nullptr;  // it waits here until it has opened `goal` times
    uint64_t goal = 0;
    std::vector<std::vector<Copy>> groups;  // committed, oldest first
    std::vector<Copy> open;

    bool runnable() const { return !done && (!barrier || barrier->opened >= goal); }
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Deposit> deposits;
    std::vector<unsigned char> memory;
    Barrier whole;
    std::vector<Barrier> warps;
    jmp_buf scheduler;
    std::function<void()> body;
    std::exception_ptr error;
    int current = 0;
    bool lazy_copies = false;
};

inline Block* block = nullptr;

inline Fiber& self() {
    return block->fibers[block->current];
}

// Back to the scheduler until it continues this thread.
inline void leave() {
    if (_setjmp(self().here) == 0) _longjmp(block->scheduler, 1);
}

inline void entry() {
    try {
        block->body();
    } catch (...) {  // cannot cross stacks
        block->error = std::current_exception();
    }
    self().done = true;
    for (Barrier* barrier : {&block->whole, &block->warps[block->current / 32]}) {
        --barrier->present;
        barrier->open_if_complete();
    }
    _longjmp(block->scheduler, 1);
}

inline void resume(int thread) {
    block->current = thread;
    threadIdx = dim3(thread);
    if (_setjmp(block->scheduler)) return;
    Fiber& fiber = self();
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

inline void wait_at(Barrier& barrier) {
    Fiber& fiber = self();
    fiber.goal = barrier.opened + 1;
    fiber.barrier = &barrier;
    ++barrier.waiting;
    barrier.open_if_complete();
    if (!fiber.runnable()) leave();
    fiber.barrier = nullptr;
}

inline void land(std::vector<Copy>& group) {
    for (const Copy& copy : group) {
        if (copy.valid)
            std::memcpy(copy.to, copy.from, 16);
        else
            std::memset(copy.to, 0, 16);
    }
    group.clear();
}

inline void run_block(const std::function<void()>& body, int threads, size_t shared_bytes, std::mt19937_64& random) {
    static std::vector<std::unique_ptr<char[]>> stacks;  // of earlier blocks
    constexpr size_t kStack = 64 * 1024;
    Block state;
    block = &state;
    state.body = body;
    state.fibers.resize(threads);
    state.deposits.resize(threads);
    state.memory.assign(shared_bytes + 16, 0xFF);  // NaN in every type
    state.whole.present = threads;
    state.warps.resize((threads + 31) / 32);
    state.lazy_copies = random() % 2;
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = state.fibers[i];
        ++state.warps[i / 32].present;
        if (stacks.empty()) stacks.emplace_back(new char[kStack]);
        fiber.stack = std::move(stacks.back());
        stacks.pop_back();
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = kStack;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, entry, 0);
    }
    std::vector<int> order(state.warps.size());
    for (size_t warp = 0; warp < order.size(); ++warp) order[warp] = warp;
    for (bool advanced = true; advanced && !state.error;) {
        advanced = false;
        std::shuffle(order.begin(), order.end(), random);
        for (int warp : order)
            // Some warps run ahead of the others.
            for (int turns = 1 + random() % 4; turns > 0; --turns)
                for (int i = warp * 32; i < std::min(warp * 32 + 32, threads); ++i)
                    if (state.fibers[i].runnable() && !state.error) {
                        advanced = true;
                        resume(i);
                    }
    }
    for (Fiber& fiber : state.fibers) stacks.push_back(std::move(fiber.stack));
    block = nullptr;
    if (state.error) std::rethrow_exception(state.error);
    if (state.whole.present) throw std::runtime_error("the threads of a block wait for each other for ever");
}

// Throws what a thread throws.
inline void run_grid(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& body) {
    std::mt19937_64 random(seed);
    gridDim = grid;
    blockDim = dim3(threads, 1, 1);
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = dim3(x, y, z);
                run_block(body, threads, shared_bytes, random);
            }
}

// -- kernels by name, as a driver finds them

struct Kernel {
    // With the addresses of the arguments. Throws what a thread throws.
    std::function<void(dim3 grid, int threads, size_t shared_bytes, void** arguments)> launch;
    std::vector<size_t> sizes;  // of the arguments
};

inline std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

template <class... Args, size_t... I>
bool add(const char* name, void (*function)(Args...), std::index_sequence<I...>) {
    kernels()[name] = {[function](dim3 grid, int threads, size_t shared_bytes, void** arguments) {
                           run_grid(grid, threads, shared_bytes,
                                    [&] { function(*static_cast<Args*>(arguments[I])...); });
                       },
                       {sizeof(Args)...}};
    return true;
}

template <class... Args>
bool add(const char* name, void (*function)(Args...)) {
    return add(name, function, std::index_sequence_for<Args...>());
}

inline float half_to_float(uint16_t bits) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return static_cast<float>(value);
}

}  // namespace emulator

namespace gptq {

constexpr int kBlockSharedBytes = kSharedBytes;

inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
    return (a & b) | c;
}

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = a | uint64_t{b} << 32;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return result;
}

inline uint32_t rotate_right(uint32_t a, uint32_t by) {
    return by % 32 ? a >> by % 32 | a << (32 - by % 32) : a;
}

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float f16_to_float(uint16_t bits) {
    return emulator::half_to_float(bits);
}
inline uint16_t float_to_f16(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
inline float bf16_to_float(uint16_t bits) {
    return as_float(uint32_t(bits) << 16);
}
inline uint16_t float_to_bf16(float value) {
    const uint32_t bits = as_bits(value);
    if (value != value) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

template <class T>
float to_float(uint16_t bits) {
    return std::is_same_v<T, BF16> ? bf16_to_float(bits) : f16_to_float(bits);
}
template <class T>
uint16_t of_float(float value) {
    return std::is_same_v<T, BF16> ? float_to_bf16(value) : float_to_f16(value);
}

template <class T>
uint32_t subtract2(uint32_t a, uint32_t b) {
    const uint16_t low = of_float<T>(to_float<T>(a & 0xFFFF) - to_float<T>(b & 0xFFFF));
    const uint16_t high = of_float<T>(to_float<T>(a >> 16) - to_float<T>(b >> 16));
    return low | uint32_t(high) << 16;
}

inline uint32_t multiply_add2(uint32_t a, uint32_t b, uint32_t c) {
    auto part = [](uint32_t a, uint32_t b, uint32_t c) -> uint16_t {
        return of_float<F16>(std::fma(to_float<F16>(a), to_float<F16>(b), to_float<F16>(c)));
    };
    return part(a & 0xFFFF, b & 0xFFFF, c & 0xFFFF) | uint32_t(part(a >> 16, b >> 16, c >> 16)) << 16;
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
    using namespace emulator;
    const int me = block->current, warp = me / 32 * 32, lane = me % 32;
    Deposit& mine = block->deposits[me];
    std::copy(a, a + 4, mine.a);
    mine.b[0] = b0;
    mine.b[1] = b1;
    wait_at(block->warps[me / 32]);
    const Deposit* all = &block->deposits[warp];
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = c[i];
        for (int k = 0; k < 16; ++k) {
            // A: a0 a1 hold k < 8, of rows below 8 and from 8 on; a2 a3 k >= 8. B: b0 holds k < 8.
            const uint32_t left = all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
            const uint32_t right = all[column * 4 + k % 8 / 2].b[k / 8];
            sum += double(to_float<T>(k % 2 ? left >> 16 : left & 0xFFFF)) *
                   to_float<T>(k % 2 ? right >> 16 : right & 0xFFFF);
        }
        d[i] = static_cast<float>(sum);
    }
    wait_at(block->warps[me / 32]);  // before anyone deposits again
}

template <int Words>
void load_streaming(uint32_t* to, const uint32_t* from) {
    if (reinterpret_cast<uintptr_t>(from) % (Words * 4)) throw std::runtime_error("misaligned load");
    std::memcpy(to, from, Words * 4);
}

template <class T>
T load_cached(const T* from) {
    if (reinterpret_cast<uintptr_t>(from) % sizeof(T)) throw std::runtime_error("misaligned load");
    return *from;
}

inline void copy16(void* to, const void* from, bool valid) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
        throw std::runtime_error("misaligned copy");
    emulator::self().open.push_back({to, from, valid});
    if (!emulator::block->lazy_copies) emulator::land(emulator::self().open);
}
inline void commit_copies() {
    auto& fiber = emulator::self();
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}
template <int Pending>
void wait_copies() {
    auto& groups = emulator::self().groups;
    while (groups.size() > Pending) {
        emulator::land(groups.front());
        groups.erase(groups.begin());
    }
}

inline int uniform(int value) {
    return value;
}

template <class T>
T kept(T value) {
    return value;
}

inline void synchronize_block() {
    emulator::wait_at(emulator::block->whole);
}

inline unsigned char* shared_memory() {
    const uintptr_t at = reinterpret_cast<uintptr_t>(emulator::block->memory.data());
    return reinterpret_cast<unsigned char*>((at + 15) / 16 * 16);
}

}  // namespace gptq
