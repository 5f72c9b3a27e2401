// A machine for PTX: the 32 lanes of a warp step together, warps take turns between barriers.
#pragma once
#include <array>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "memory.h"

namespace ptx {

constexpr int kLanes = 32;
using Mask = uint32_t;  // a bit per lane
using Slot = int;       // the number of a register; constants have registers too

// The first slots are those of the special registers, as assemble.py lists them.
enum : Slot { kThread, kThreads, kBlockX, kBlockY, kBlockZ, kBlocksX, kBlocksY, kBlocksZ };

class Warp;
struct Instruction;

// What the scheduler does with an instruction: lanes run one by one, jump, end, or need their whole warp or block.
enum class Kind { lanes, branch, exit, warp, block };

// An operation of PTX by its name, e.g. "add.s32". effect: of the lanes of a mask.
struct Operation {
    Kind kind;
    std::function<void(Warp&, const Instruction&, Mask)> effect;
};
using Operations = std::map<std::string, Operation>;

void add_arithmetic(Operations& to);
void add_conversions(Operations& to);
void add_transfers(Operations& to);
void add_warp_operations(Operations& to);

struct Instruction {
    const Operation* operation;
    Slot guard;  // the lanes in which it is not `negated` execute; -1: all
    bool negated;
    std::vector<Slot> operands;  // results first; of a branch: the number of the next instruction
    std::string text;
    mutable uint64_t executed = 0;  // times, by one lane or more
};

struct Parameter {
    size_t offset, bytes;
};

struct Program {
    std::string name;
    int slots;
    std::vector<std::pair<Slot, uint64_t>> constants;
    std::vector<Parameter> parameters;
    std::vector<Instruction> code;
};

struct Block {
    const std::vector<unsigned char>& parameters;
    GlobalMemory& global;
    SharedMemory shared;
    int number;             // in the grid
    uint32_t barriers = 0;  // that all threads have left behind
};

// Bytes on their way from global to shared memory; beyond `valid` come zeros.
struct Copy {
    uint64_t to, from;
    int bytes, valid;
};

template <class T>
T of_bits(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
template <>
inline bool of_bits<bool>(uint64_t bits) {
    return bits & 1;
}
// A signed number fills a wider register with its sign, as loads and conversions do.
template <class T>
uint64_t to_bits(T value) {
    if constexpr (std::is_integral_v<T>) return static_cast<uint64_t>(value);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

class Warp {
  public:
    Warp(Block& block_, int number_, int slots)
        : block(block_), number(number_), registers_(size_t(slots) * kLanes, ~uint64_t{0}) {}  // NaN in every type

    uint64_t* lanes(Slot slot) { return &registers_[size_t(slot) * kLanes]; }
    template <class T>
    T get(Slot slot, int lane) {
        return of_bits<T>(lanes(slot)[lane]);
    }
    template <class T>
    void set(Slot slot, int lane, T value) {
        lanes(slot)[lane] = to_bits(value);
    }
    Access access(int lane) const { return {number * kLanes + lane, block.number, block.barriers, barriers}; }

    Block& block;
    const int number;
    uint32_t barriers = 0;                                      // of this warp alone
    std::array<std::vector<std::vector<Copy>>, kLanes> groups;  // of copies, committed, oldest first
    std::array<std::vector<Copy>, kLanes> open;                 // not committed

    // For the scheduler: the lanes that step together, their next instruction, and where the others are.
    std::array<int, kLanes> next{};
    Mask alive = 0, waiting = 0, active = 0;
    int at = 0, nearest = 0;
    bool at_barrier = false;

  private:
    std::vector<uint64_t> registers_;
};

template <class F>
void on_lanes(Mask mask, F f) {
    for (int lane = 0; lane < kLanes; ++lane)
        if (mask >> lane & 1) f(lane);
}

// result = f(operand, ...), lane by lane.
template <class To, class... From, class F>
Operation lanewise(F f) {
    return {Kind::lanes, [f](Warp& warp, const Instruction& i, Mask mask) {
                const auto apply = [&]<size_t... I>(std::index_sequence<I...>) {
                    uint64_t* const to = warp.lanes(i.operands[0]);
                    const std::array<const uint64_t*, sizeof...(From)> from{warp.lanes(i.operands[1 + I])...};
                    on_lanes(mask, [&](int lane) { to[lane] = to_bits<To>(f(of_bits<From>(from[I][lane])...)); });
                };
                apply(std::index_sequence_for<From...>());
            }};
}

struct Grid {
    unsigned x, y, z;
};

// Runs a launch. Throws Fault, with the kernel, block and instruction. seed: of the order of warps.
void run(const Program& program, Grid grid, int threads, size_t shared_bytes,
         const std::vector<unsigned char>& parameters, GlobalMemory& global, uint64_t seed);

}  // namespace ptx
