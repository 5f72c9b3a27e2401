// The scheduler. Lanes of a warp that are at the same instruction step together; of several groups the one that is
// farthest behind, so that they meet again. A warp goes on for a random number of steps until it waits at a barrier.
#include "machine.h"

#include <algorithm>
#include <climits>
#include <random>

namespace ptx {
namespace {

constexpr int64_t kLongest = 50'000'000;  // steps of a block, all warps together

void choose_group(Warp& warp) {
    const Mask runnable = warp.alive & ~warp.waiting;
    warp.at = warp.nearest = INT_MAX;
    on_lanes(runnable, [&](int lane) { warp.at = std::min(warp.at, warp.next[lane]); });
    warp.active = 0;
    on_lanes(runnable, [&](int lane) {
        if (warp.next[lane] == warp.at)
            warp.active |= 1u << lane;
        else
            warp.nearest = std::min(warp.nearest, warp.next[lane]);
    });
}

void leave_group(Warp& warp) {
    on_lanes(warp.active, [&](int lane) { warp.next[lane] = warp.at; });
    warp.active = 0;
}

Mask guarded(Warp& warp, const Instruction& i) {
    if (i.guard < 0) return warp.active;
    Mask mask = 0;
    on_lanes(warp.active, [&](int lane) { mask |= Mask(warp.get<bool>(i.guard, lane) != i.negated) << lane; });
    return mask;
}

// The lanes of `mask` have come to an instruction of the whole warp: all are there, or they wait for the others.
bool complete(Warp& warp, Mask mask) {
    if (mask == warp.alive) return true;
    on_lanes(mask, [&](int lane) { warp.next[lane] = warp.at; });
    on_lanes(warp.active & ~mask, [&](int lane) { warp.next[lane] = warp.at + 1; });
    warp.waiting |= mask;
    choose_group(warp);
    return false;
}

// All lanes wait at instructions of the whole warp -> whether it is one and the same.
void gather(Warp& warp, const Program& program) {
    warp.waiting = 0;
    choose_group(warp);
    if (warp.nearest != INT_MAX)
        throw Fault("some lanes of a warp wait here, the others at `" + program.code[warp.nearest].text + "`");
}

void step(Warp& warp, const Program& program) {
    const Instruction& i = program.code[warp.at];
    const Mask mask = guarded(warp, i);
    i.executed += mask != 0;
    switch (i.operation->kind) {
        case Kind::lanes:
            if (mask) i.operation->effect(warp, i, mask);
            ++warp.at;
            return;
        case Kind::branch:
            if (mask == 0 || mask == warp.active) {
                warp.at = mask ? i.operands[0] : warp.at + 1;
            } else {
                on_lanes(warp.active,
                         [&](int lane) { warp.next[lane] = mask >> lane & 1 ? i.operands[0] : warp.at + 1; });
                choose_group(warp);
            }
            return;
        case Kind::exit:
            on_lanes(warp.active & ~mask, [&](int lane) { warp.next[lane] = warp.at + 1; });
            warp.alive &= ~mask;
            choose_group(warp);
            return;
        case Kind::warp:
        case Kind::block:
            if (mask == 0) {
                ++warp.at;
            } else if (complete(warp, mask)) {
                i.operation->effect(warp, i, mask);
                ++warp.at;
                warp.at_barrier = i.operation->kind == Kind::block;
            }
    }
}

// -> steps taken.
int64_t advance(Warp& warp, const Program& program, int64_t steps) {
    int64_t taken = 0;
    for (; taken < steps && warp.alive && !warp.at_barrier; ++taken) {
        if (!warp.active || warp.at >= warp.nearest) {
            leave_group(warp);
            choose_group(warp);
            if (!warp.active) gather(warp, program);
        }
        step(warp, program);
    }
    return taken;
}

void start(Warp& warp, const Program& program, Grid grid, Grid at, int threads) {
    for (const auto& [slot, value] : program.constants) std::fill_n(warp.lanes(slot), kLanes, value);
    const std::pair<Slot, unsigned> special[] = {{kThreads, unsigned(threads)},
                                                 {kBlockX, at.x},
                                                 {kBlockY, at.y},
                                                 {kBlockZ, at.z},
                                                 {kBlocksX, grid.x},
                                                 {kBlocksY, grid.y},
                                                 {kBlocksZ, grid.z}};
    for (const auto& [slot, value] : special) std::fill_n(warp.lanes(slot), kLanes, value);
    for (int lane = 0; lane < kLanes; ++lane) {
        warp.lanes(kThread)[lane] = warp.number * kLanes + lane;
        if (warp.number * kLanes + lane < threads) warp.alive |= 1u << lane;
    }
    choose_group(warp);
}

void run_block(Block& block, const Program& program, Grid grid, Grid at, int threads, std::mt19937_64& random) {
    std::vector<Warp> warps;
    for (int i = 0; i * kLanes < threads; ++i) {
        warps.emplace_back(block, i, program.slots);
        start(warps.back(), program, grid, at, threads);
    }
    Warp* warp = nullptr;
    try {
        for (int64_t steps = 0; steps < kLongest;) {
            std::vector<Warp*> runnable;
            for (Warp& each : warps)
                if (each.alive && !each.at_barrier) runnable.push_back(&each);
            if (!runnable.empty()) {
                warp = runnable[random() % runnable.size()];
                steps += advance(*warp, program, 1 + random() % 400);
                continue;
            }
            if (std::none_of(warps.begin(), warps.end(), [](Warp& each) { return each.at_barrier; })) return;
            ++block.barriers;
            for (Warp& each : warps) each.at_barrier = false;
        }
        throw Fault("the block does not end");
    } catch (const Fault& fault) {
        throw Fault(program.name + ", block (" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " +
                    std::to_string(at.z) + "), `" + program.code[warp->at].text + "`: " + fault.what());
    }
}

}  // namespace

void run(const Program& program, Grid grid, int threads, size_t shared_bytes,
         const std::vector<unsigned char>& parameters, GlobalMemory& global, uint64_t seed) {
    std::mt19937_64 random(seed);
    global.start_launch();
    int number = 0;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                Block block{parameters, global, SharedMemory(shared_bytes), number++};
                run_block(block, program, grid, {x, y, z}, threads, random);
            }
}

}  // namespace ptx
