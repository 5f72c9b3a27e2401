// Operations of PTX that change what bits mean: cvt, cvta, and mov of several registers.
#include "half.h"
#include "machine.h"

namespace ptx {
namespace {

template <class To, class From>
void add_integer(Operations& to, const std::string& name) {
    to["cvt." + name] = lanewise<To, From>([](From a) { return To(a); });
}

template <class From>
void add_from_integer(Operations& to, const std::string& from) {
    add_integer<int8_t, From>(to, "s8." + from);
    add_integer<uint8_t, From>(to, "u8." + from);
    add_integer<int16_t, From>(to, "s16." + from);
    add_integer<uint16_t, From>(to, "u16." + from);
    add_integer<int32_t, From>(to, "s32." + from);
    add_integer<uint32_t, From>(to, "u32." + from);
    add_integer<int64_t, From>(to, "s64." + from);
    add_integer<uint64_t, From>(to, "u64." + from);
    to["cvt.rn.f32." + from] = lanewise<float, From>([](From a) { return float(a); });
    to["cvt.rn.f16." + from] = lanewise<uint16_t, From>([](From a) { return Half::round(double(a)); });
}

template <class T>
void add_halves(Operations& to, const std::string& type) {
    to["cvt.f32." + type] = lanewise<float, uint16_t>([](uint16_t a) { return T::to_float(a); });
    to["cvt.rn." + type + ".f32"] = lanewise<uint16_t, float>([](float a) { return T::round(a); });
    to["cvt.rn." + type + "x2.f32"] = lanewise<uint32_t, float, float>(
        [](float high, float low) { return uint32_t(T::round(high)) << 16 | T::round(low); });
}

// The assembler's names for mov with {registers} on one side: the first is the lowest.
template <class Whole, class Part>
void add_parts(Operations& to, const std::string& type) {
    to["pack." + type] =
        lanewise<Whole, Part, Part>([](Part low, Part high) { return Whole(low | Whole(high) << sizeof(Part) * 8); });
    to["unpack." + type] = {Kind::lanes, [](Warp& warp, const Instruction& i, Mask mask) {
                                on_lanes(mask, [&](int lane) {
                                    const Whole whole = warp.get<Whole>(i.operands[2], lane);
                                    warp.set(i.operands[0], lane, Part(whole));
                                    warp.set(i.operands[1], lane, Part(whole >> sizeof(Part) * 8));
                                });
                            }};
}

}  // namespace

void add_conversions(Operations& to) {
    add_from_integer<int8_t>(to, "s8");
    add_from_integer<uint8_t>(to, "u8");
    add_from_integer<int16_t>(to, "s16");
    add_from_integer<uint16_t>(to, "u16");
    add_from_integer<int32_t>(to, "s32");
    add_from_integer<uint32_t>(to, "u32");
    add_from_integer<int64_t>(to, "s64");
    add_from_integer<uint64_t>(to, "u64");
    add_halves<Half>(to, "f16");
    add_halves<BHalf>(to, "bf16");
    add_parts<uint32_t, uint16_t>(to, "b32");
    add_parts<uint64_t, uint32_t>(to, "b64");
    to["cvta.to.global.u64"] = lanewise<uint64_t, uint64_t>([](uint64_t a) { return a; });
}

}  // namespace ptx
