// Operations of PTX that move data: ld, st, and copies from global to shared memory that take their time.
#include <algorithm>

#include "machine.h"

namespace ptx {
namespace {

enum class Space { parameter, shared, global };

// Of a memory operand: register + constant.
uint64_t address(Warp& warp, const Instruction& i, size_t operand, int lane) {
    return warp.get<uint64_t>(i.operands[operand], lane) + warp.get<uint64_t>(i.operands[operand + 1], lane);
}

void read(Warp& warp, Space space, uint64_t at, int bytes, unsigned char* to, int lane) {
    switch (space) {
        case Space::parameter:
            if (at + bytes > warp.block.parameters.size()) throw Fault("beyond the parameters");
            std::memcpy(to, &warp.block.parameters[at], bytes);
            return;
        case Space::shared:
            // An address in shared memory has 32 bits.
            return warp.block.shared.read(uint32_t(at), bytes, to, warp.access(lane));
        case Space::global:
            return warp.block.global.read(at, bytes, to, warp.access(lane));
    }
}

// Operands: `count` registers, then the address.
Operation load(Space space, int count, int bytes, bool is_signed) {
    return {Kind::lanes, [=](Warp& warp, const Instruction& i, Mask mask) {
                on_lanes(mask, [&](int lane) {
                    unsigned char data[16];
                    read(warp, space, address(warp, i, count, lane), count * bytes, data, lane);
                    for (int n = 0; n < count; ++n) {
                        uint64_t value = 0;
                        std::memcpy(&value, data + n * bytes, bytes);
                        const int unused = 64 - bytes * 8;
                        if (is_signed) value = uint64_t(int64_t(value << unused) >> unused);
                        warp.lanes(i.operands[n])[lane] = value;
                    }
                });
            }};
}

// Operands: the address, then `count` registers.
Operation store(Space space, int count, int bytes) {
    return {Kind::lanes, [=](Warp& warp, const Instruction& i, Mask mask) {
                on_lanes(mask, [&](int lane) {
                    unsigned char data[16];
                    for (int n = 0; n < count; ++n)
                        std::memcpy(data + n * bytes, warp.lanes(i.operands[2 + n]) + lane, bytes);
                    const uint64_t at = address(warp, i, 0, lane);
                    if (space == Space::shared)
                        warp.block.shared.write(uint32_t(at), count * bytes, data, warp.access(lane));
                    else
                        warp.block.global.write(at, count * bytes, data, warp.access(lane));
                });
            }};
}

// Operands: the addresses in shared and in global memory, the bytes to write, and where given those to read.
void start_copy(Warp& warp, const Instruction& i, Mask mask) {
    on_lanes(mask, [&](int lane) {
        const Access who = warp.access(lane);
        const int bytes = warp.get<int32_t>(i.operands[4], lane);
        const int valid = i.operands.size() > 5 ? std::min(warp.get<int32_t>(i.operands[5], lane), bytes) : bytes;
        const Copy copy{uint32_t(address(warp, i, 0, lane)), address(warp, i, 2, lane), bytes, valid};
        if (copy.from % bytes) throw Fault("a misaligned source of an asynchronous copy");
        if (valid == bytes) warp.block.global.check(copy.from, bytes, who);
        warp.block.shared.start_copy(copy.to, bytes, who);
        warp.open[lane].push_back(copy);
    });
}

void commit(Warp& warp, const Instruction&, Mask mask) {
    on_lanes(mask, [&](int lane) {
        warp.groups[lane].push_back(std::move(warp.open[lane]));
        warp.open[lane].clear();
    });
}

void wait(Warp& warp, size_t pending, int lane) {
    auto& groups = warp.groups[lane];
    const Access who = warp.access(lane);
    while (groups.size() > pending) {
        for (const Copy& copy : groups.front()) {
            unsigned char data[16] = {};
            for (int i = 0; i < copy.valid; ++i) warp.block.global.read(copy.from + i, 1, data + i, who);
            warp.block.shared.land_copy(copy.to, copy.bytes, data, who);
        }
        groups.erase(groups.begin());
    }
}

}  // namespace

void add_transfers(Operations& to) {
    const std::pair<std::string, Space> spaces[] = {
        {"param", Space::parameter}, {"shared", Space::shared}, {"global", Space::global}};
    const std::pair<std::string, int> vectors[] = {{"", 1}, {"v2.", 2}, {"v4.", 4}};
    for (const auto& [name, space] : spaces)
        for (const auto& [vector, count] : vectors)
            for (const std::string kind : {"b", "u", "s", "f"})
                for (int bytes = 1; bytes <= 8 && bytes * count <= 16; bytes *= 2) {
                    const std::string rest = "." + name + "." + vector + kind + std::to_string(bytes * 8);
                    to["ld" + rest] = load(space, count, bytes, kind == "s");
                    if (space != Space::parameter) to["st" + rest] = store(space, count, bytes);
                }
    to["cp.async.ca.shared.global"] = to["cp.async.cg.shared.global"] = {Kind::lanes, start_copy};
    to["cp.async.commit_group"] = {Kind::lanes, commit};
    to["cp.async.wait_group"] = {
        Kind::lanes, [](Warp& warp, const Instruction& i, Mask mask) {
            on_lanes(mask, [&](int lane) { wait(warp, warp.get<uint32_t>(i.operands[0], lane), lane); });
        }};
    to["cp.async.wait_all"] = {Kind::lanes, [](Warp& warp, const Instruction& i, Mask mask) {
                                   commit(warp, i, mask);
                                   on_lanes(mask, [&](int lane) { wait(warp, 0, lane); });
                               }};
}

}  // namespace ptx
