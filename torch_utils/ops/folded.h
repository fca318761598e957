// A folded layer (chain.py): y = clamp(leaky ReLU(weight @ x + bias)), and the vectors that it is computed in. Its ctypes
// twin is CLayer in chain.py.

#pragma once

#include <cstdint>

struct Folded {
    const float *weight;  // [O,I], or [N,O,I] with `per_image`; chain.cpp takes it packed
    const float *bias;    // [O]
    int64_t inputs, outputs;
    int64_t per_image;  // whether each image has its own weight
    int64_t branch;     // whether y is added to the sum, and the next layer has the same input
    int64_t term;       // whether the next term is added to y
    float slope, clamp;
};

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
using Vector = float __attribute__((vector_size(LANES * sizeof(float))));
