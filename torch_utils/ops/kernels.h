// Shared by the CUDA sources, which NVRTC compiles for one type T of numbers: that of TYPE (DTYPES in build.py).

#pragma once

#ifdef __CUDACC_RTC__  // which finds no headers of CUDA
using int64_t = long long;
using uint16_t = unsigned short;

struct Half {
    uint16_t bits;
    Half() = default;
    __device__ Half(float value) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value)); }
    __device__ operator float() const {
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
        return value;
    }
};

struct BFloat {
    uint16_t bits;
    BFloat() = default;
    __device__ BFloat(float value) {
#if __CUDA_ARCH__ >= 800
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else  // to the nearest, and of two to the even
        const unsigned wide = __float_as_uint(value);
        bits = value != value ? 0x7fff : uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
#endif
    }
    __device__ operator float() const { return __uint_as_float(unsigned(bits) << 16); }
};
#endif

#if TYPE == 0
using T = double;
#elif TYPE == 1
using T = float;
#elif TYPE == 2
using T = Half;
#else
using T = BFloat;
#endif

// The type of arithmetic on T.
#if TYPE == 0
using Wide = double;
#else
using Wide = float;
#endif

// The elements of 16 bytes, and one load or store of them.
struct alignas(16) Pack {
    static constexpr int size = 16 / sizeof(T);
    T at[size];
};
__device__ inline Pack get(const T *from) {
    const uint4 bits = *reinterpret_cast<const uint4 *>(from);
    return reinterpret_cast<const Pack &>(bits);
}
__device__ inline void put(T *to, const Pack &pack) {
    __stcg(reinterpret_cast<uint4 *>(to), reinterpret_cast<const uint4 &>(pack));  // an assignment may be split
}

struct Formula {
    Wide slope, gain, clamp;

    // clamp(gain · (v > 0 ? v : slope · v), ±clamp). NaN propagates. Element j of a pack sets two bits of its code,
    // which suffice for derivatives: whether v > 0, and whether it was clamped.
    __device__ Wide value(Wide v, int j, unsigned &code) const {
        code |= unsigned(v > 0) << 2 * j;
        v = (v > 0 ? v : v * slope) * gain;
        const bool above = v > clamp, below = v < -clamp;
        code |= unsigned(above | below) << (2 * j + 1);
        return above ? clamp : below ? -clamp : v;
    }

    // g times the derivative at element j, which is linear in g.
    __device__ Wide gradient(Wide g, int j, unsigned code) const {
        const unsigned bits = code >> 2 * j;
        g *= gain;
        return bits & 2 ? Wide(0) : bits & 1 ? g : g * slope;
    }
};
