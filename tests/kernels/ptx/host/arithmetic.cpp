// Operations of PTX on numbers, as the PTX ISA defines them: integers, bits, predicates and floats.
#include <algorithm>
#include <limits>

#include "half.h"
#include "machine.h"

namespace ptx {
namespace {

template <class T>
constexpr int kBits = sizeof(T) * 8;

// Integers of 16 bits would become int, whose overflow is undefined; unsigned ones of 64 bits wrap for all.
template <class T>
uint64_t wide(T value) {
    return static_cast<uint64_t>(value);
}

template <class T>
T shift_right(T value, uint32_t by) {
    if (by < kBits<T>) return T(value >> by);
    return value < 0 ? T(-1) : T(0);
}

// Bits [position, position + length) with the sign of the last bit, if T is signed.
template <class T>
T extract(T value, uint32_t position, uint32_t length) {
    position &= 0xFF, length &= 0xFF;
    if (length == 0) return 0;
    const bool negative =
        std::is_signed_v<T> && wide(value) >> std::min<uint32_t>(position + length - 1, kBits<T> - 1) & 1;
    uint64_t bits = position < kBits<T> ? wide(std::make_unsigned_t<T>(value)) >> position : 0;
    if (length < 64) bits &= (uint64_t{1} << length) - 1;
    const uint32_t known = std::min<uint32_t>(length, position < kBits<T> ? kBits<T> - position : 0);
    return T(negative && known < 64 ? bits | ~uint64_t{0} << known : bits);
}

uint32_t insert(uint32_t from, uint32_t into, uint32_t position, uint32_t length) {
    const uint64_t mask = ((uint64_t{1} << std::min(length & 0xFF, 32u)) - 1) << std::min(position & 0xFF, 32u);
    return uint32_t((into & ~mask) | ((uint64_t{from} << std::min(position & 0xFF, 32u)) & mask));
}

uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selectors) {
    const uint64_t bytes = a | uint64_t{b} << 32;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t selector = selectors >> 4 * i & 0xF;
        uint32_t byte = bytes >> 8 * (selector & 7) & 0xFF;
        if (selector & 8) byte = byte & 0x80 ? 0xFF : 0;  // its sign
        result |= byte << 8 * i;
    }
    return result;
}

// Bit by bit, the entry of `table` that the bits of a, b and c number.
uint32_t look_up(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
    uint32_t result = 0;
    for (int entry = 0; entry < 8; ++entry)
        if (table >> entry & 1) result |= (entry & 4 ? a : ~a) & (entry & 2 ? b : ~b) & (entry & 1 ? c : ~c);
    return result;
}

template <class T>
void add_bits(Operations& to, const std::string& type) {
    to["and." + type] = lanewise<T, T, T>([](T a, T b) { return T(a & b); });
    to["or." + type] = lanewise<T, T, T>([](T a, T b) { return T(a | b); });
    to["xor." + type] = lanewise<T, T, T>([](T a, T b) { return T(a ^ b); });
    to["not." + type] = lanewise<T, T>([](T a) { return T(~a); });
    to["shl." + type] =
        lanewise<T, T, uint32_t>([](T a, uint32_t by) { return by < kBits<T> ? T(wide(a) << by) : T(0); });
    to["shr." + type] = lanewise<T, T, uint32_t>(shift_right<T>);
    to["mov." + type] = lanewise<T, T>([](T a) { return a; });
    to["selp." + type] = lanewise<T, T, T, bool>([](T a, T b, bool first) { return first ? a : b; });
}

template <class T>
void add_comparisons(Operations& to, const std::string& type) {
    to["setp.eq." + type] = lanewise<bool, T, T>([](T a, T b) { return a == b; });
    to["setp.ne." + type] = lanewise<bool, T, T>([](T a, T b) { return a != b && a == a && b == b; });
    to["setp.lt." + type] = lanewise<bool, T, T>([](T a, T b) { return a < b; });
    to["setp.le." + type] = lanewise<bool, T, T>([](T a, T b) { return a <= b; });
    to["setp.gt." + type] = lanewise<bool, T, T>([](T a, T b) { return a > b; });
    to["setp.ge." + type] = lanewise<bool, T, T>([](T a, T b) { return a >= b; });
}

template <class T>
void add_integers(Operations& to, const std::string& type) {
    add_bits<T>(to, type);
    add_comparisons<T>(to, type);
    to["add." + type] = lanewise<T, T, T>([](T a, T b) { return T(wide(a) + wide(b)); });
    to["sub." + type] = lanewise<T, T, T>([](T a, T b) { return T(wide(a) - wide(b)); });
    to["neg." + type] = lanewise<T, T>([](T a) { return T(-wide(a)); });
    to["mul.lo." + type] = lanewise<T, T, T>([](T a, T b) { return T(wide(a) * wide(b)); });
    to["mad.lo." + type] = lanewise<T, T, T, T>([](T a, T b, T c) { return T(wide(a) * wide(b) + wide(c)); });
    to["min." + type] = lanewise<T, T, T>([](T a, T b) { return std::min(a, b); });
    to["max." + type] = lanewise<T, T, T>([](T a, T b) { return std::max(a, b); });
    const auto defined = [](T a, T b) {  // by zero, PTX leaves the result open
        return b != 0 && !(std::is_signed_v<T> && a == std::numeric_limits<T>::min() && b == T(-1));
    };
    to["div." + type] = lanewise<T, T, T>([defined](T a, T b) { return defined(a, b) ? T(a / b) : T(-1); });
    to["rem." + type] = lanewise<T, T, T>([defined](T a, T b) { return defined(a, b) ? T(a % b) : T(-1); });
}

// Wide: an integer of twice the width.
template <class T, class Wide>
void add_products(Operations& to, const std::string& type) {
    to["mul.wide." + type] = lanewise<Wide, T, T>([](T a, T b) { return Wide(Wide(a) * Wide(b)); });
    to["mad.wide." + type] =
        lanewise<Wide, T, T, Wide>([](T a, T b, Wide c) { return Wide(wide(Wide(a) * Wide(b)) + wide(c)); });
    to["mul.hi." + type] = lanewise<T, T, T>([](T a, T b) { return T(Wide(a) * Wide(b) >> kBits<T>); });
}

void add_floats(Operations& to) {
    add_comparisons<float>(to, "f32");
    to["setp.nan.f32"] = lanewise<bool, float, float>([](float a, float b) { return a != a || b != b; });
    to["add.f32"] = lanewise<float, float, float>([](float a, float b) { return a + b; });
    to["sub.f32"] = lanewise<float, float, float>([](float a, float b) { return a - b; });
    to["mul.f32"] = lanewise<float, float, float>([](float a, float b) { return a * b; });
    to["fma.rn.f32"] =
        lanewise<float, float, float, float>([](float a, float b, float c) { return std::fma(a, b, c); });
    to["neg.f32"] = lanewise<float, float>([](float a) { return -a; });
    to["mov.f32"] = lanewise<float, float>([](float a) { return a; });
    to["selp.f32"] = lanewise<float, float, float, bool>([](float a, float b, bool first) { return first ? a : b; });
}

// One 16-bit float, and two in a word.
template <class T, class F, class... Word>
Operation in_pairs(F f, Word...) {
    return lanewise<uint32_t, Word...>([f](Word... words) {
        return uint32_t(T::round(f(double(T::to_float(words & 0xFFFF))...))) |
               uint32_t(T::round(f(double(T::to_float(words >> 16))...))) << 16;
    });
}

template <class T>
void add_halves(Operations& to, const std::string& type) {
    constexpr uint32_t word = 0;
    const auto sum = [](double a, double b) { return a + b; };
    const auto difference = [](double a, double b) { return a - b; };
    const auto product = [](double a, double b) { return a * b; };
    const auto fused = [](double a, double b, double c) { return a * b + c; };  // a * b is exact
    to["add." + type + "x2"] = in_pairs<T>(sum, word, word);
    to["sub." + type + "x2"] = in_pairs<T>(difference, word, word);
    to["mul." + type + "x2"] = in_pairs<T>(product, word, word);
    to["fma.rn." + type + "x2"] = in_pairs<T>(fused, word, word, word);
    // The upper half of such a word is nothing's; a 16-bit register does not have it.
    for (const std::string name : {"add.", "sub.", "mul.", "fma.rn."}) to[name + type] = to[name + type + "x2"];
}

}  // namespace

void add_arithmetic(Operations& to) {
    add_integers<int16_t>(to, "s16");
    add_integers<uint16_t>(to, "u16");
    add_integers<int32_t>(to, "s32");
    add_integers<uint32_t>(to, "u32");
    add_integers<int64_t>(to, "s64");
    add_integers<uint64_t>(to, "u64");
    add_bits<uint16_t>(to, "b16");
    add_bits<uint32_t>(to, "b32");
    add_bits<uint64_t>(to, "b64");
    add_comparisons<uint16_t>(to, "b16");
    add_comparisons<uint32_t>(to, "b32");
    add_comparisons<uint64_t>(to, "b64");
    add_products<int16_t, int32_t>(to, "s16");
    add_products<uint16_t, uint32_t>(to, "u16");
    add_products<int32_t, int64_t>(to, "s32");
    add_products<uint32_t, uint64_t>(to, "u32");
    to["and.pred"] = lanewise<bool, bool, bool>([](bool a, bool b) { return a && b; });
    to["or.pred"] = lanewise<bool, bool, bool>([](bool a, bool b) { return a || b; });
    to["xor.pred"] = lanewise<bool, bool, bool>([](bool a, bool b) { return a != b; });
    to["not.pred"] = lanewise<bool, bool>([](bool a) { return !a; });
    to["mov.pred"] = lanewise<bool, bool>([](bool a) { return a; });
    to["bfe.u32"] = lanewise<uint32_t, uint32_t, uint32_t, uint32_t>(extract<uint32_t>);
    to["bfe.s32"] = lanewise<int32_t, int32_t, uint32_t, uint32_t>(extract<int32_t>);
    to["bfi.b32"] = lanewise<uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>(insert);
    to["prmt.b32"] = lanewise<uint32_t, uint32_t, uint32_t, uint32_t>(permute_bytes);
    to["lop3.b32"] = lanewise<uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>(look_up);
    to["shf.r.wrap.b32"] = lanewise<uint32_t, uint32_t, uint32_t, uint32_t>(
        [](uint32_t low, uint32_t high, uint32_t by) { return uint32_t((low | uint64_t{high} << 32) >> (by & 31)); });
    add_floats(to);
    add_halves<Half>(to, "f16");
    add_halves<BHalf>(to, "bf16");
}

}  // namespace ptx
