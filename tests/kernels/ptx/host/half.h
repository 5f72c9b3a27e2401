// 16-bit floats as bits: to float and, with one rounding to nearest even, back.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace ptx {

template <class To, class From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

struct Half {
    static float to_float(uint16_t bits) {
        static const std::vector<float> all = [] {  // a conversion is a slow call where the processor has none
            std::vector<float> values(1 << 16);
            for (int i = 0; i < 1 << 16; ++i) values[i] = float(bits_as<_Float16>(uint16_t(i)));
            return values;
        }();
        return all[bits];
    }
    static uint16_t round(double value) { return bits_as<uint16_t>(static_cast<_Float16>(value)); }
};

struct BHalf {
    static float to_float(uint16_t bits) { return bits_as<float>(uint32_t(bits) << 16); }
    static uint16_t round(double value) {
        if (std::isnan(value)) return 0x7FFF;
        float near = static_cast<float>(value);
        uint32_t bits = bits_as<uint32_t>(near);
        // What was lost on the way to float stays visible in its last bit, so that nothing is rounded twice.
        if (std::isfinite(near) && double(near) != value) bits = (bits - (std::fabs(near) > std::fabs(value))) | 1;
        return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    }
};

}  // namespace ptx
