// Shared by the CUDA sources: loads of 16 bytes, the formula of bias_act for one element, and kernel launches.

#pragma once

#include <climits>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// The type of arithmetic on T.
template <typename T>
struct WideOf {
    using type = float;
};
template <>
struct WideOf<double> {
    using type = double;
};
template <typename T>
using Wide = typename WideOf<T>::type;

// The elements of 16 bytes, and one load or store of them.
template <typename T>
struct alignas(16) Pack {
    static constexpr int size = 16 / sizeof(T);
    T at[size];
};
template <typename T>
__device__ Pack<T> get(const T *from) {
    const uint4 bits = *reinterpret_cast<const uint4 *>(from);
    return reinterpret_cast<const Pack<T> &>(bits);
}
template <typename T>
__device__ void put(T *to, const Pack<T> &pack) {
    __stcg(reinterpret_cast<uint4 *>(to), reinterpret_cast<const uint4 &>(pack));  // nvcc may split an assignment
}

template <typename A>
struct Formula {
    A slope, gain, clamp;

    // clamp(gain · (v > 0 ? v : slope · v), ±clamp). NaN propagates. Element j of a pack sets two bits of its code,
    // which suffice for derivatives: whether v > 0, and whether it was clamped.
    __device__ A value(A v, int j, unsigned &code) const {
        code |= unsigned(v > 0) << 2 * j;
        v = (v > 0 ? v : v * slope) * gain;
        const bool above = v > clamp, below = v < -clamp;
        code |= unsigned(above | below) << (2 * j + 1);
        return above ? clamp : below ? -clamp : v;
    }

    // g times the derivative at element j, which is linear in g.
    __device__ A gradient(A g, int j, unsigned code) const {
        const unsigned bits = code >> 2 * j;
        g *= gain;
        return bits & 2 ? A(0) : bits & 1 ? g : g * slope;
    }
};

// f(Type<T>{}) for the T of that number (DTYPES in build.py).
template <typename T>
struct Type {
    using type = T;
};
template <typename F>
const char *dispatch(int64_t dtype, F f) {
    switch (dtype) {
        case 0: return f(Type<double>{});
        case 1: return f(Type<float>{});
        case 2: return f(Type<__half>{});
        case 3: return f(Type<__nv_bfloat16>{});
        default: return "unknown dtype";
    }
}

static const char *message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// Checks that the device can run the kernel: the driver may be too old for this library. Returns as `launch`.
template <typename... P>
const char *examine(int64_t device, void (*kernel)(P...)) {
    cudaFuncAttributes attributes;
    cudaError_t error = cudaSetDevice(int(device));
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
    return message(error);
}

// Launches the kernel. Returns nullptr or an error message.
template <typename... P, typename... A>
const char *launch(int64_t device, cudaStream_t stream, int64_t blocks, int threads, void (*kernel)(P...),
                   A... arguments) {
    if (blocks == 0) return nullptr;
    if (blocks > INT_MAX) return "the tensors are too large for one launch";
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.stream = stream;
    // This library has its own CUDA runtime, which must use the device that PyTorch's uses.
    cudaError_t error = cudaSetDevice(int(device));
    if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, arguments...);
    return message(error);
}
