// bfloat16 in memory, float in arithmetic.

#pragma once

#include <cstdint>
#include <cstring>

struct BFloat {
    uint16_t bits;
    operator float() const {
        const uint32_t wide = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }
    BFloat() = default;
    explicit BFloat(float value) {  // to the nearest, ties to even; NaN stays NaN
        uint32_t wide;
        std::memcpy(&wide, &value, 4);
        bits = uint16_t(value != value ? 0x7fc0 : (wide + 0x7fff + (wide >> 16 & 1)) >> 16);
    }
};
