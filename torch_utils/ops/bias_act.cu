// bias_act on a GPU (see bias_act.py). It is bound by memory, so it loads and stores 16 bytes at a time.

#include "bias_act.h"

#include <algorithm>

constexpr int THREADS = 256;

template <typename T>
__device__ Pack<T> load(const T *x, int64_t first, int64_t count) {
    if (first + Pack<T>::size <= count) return get(x + first);
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < pack.size; j++) pack.at[j] = first + j < count ? x[first + j] : T(0.0f);
    return pack;
}

template <typename T>
__device__ void store(T *y, int64_t first, int64_t count, const Pack<T> &pack) {
    if (first + pack.size <= count) {
        put(y + first, pack);
        return;
    }
#pragma unroll
    for (int j = 0; j < pack.size; j++)
        if (first + j < count) y[first + j] = pack.at[j];
}

// The position of an element in [A,C,B]: its channel c and its index b.
struct Place {
    int64_t channel, inner;
};

// The bias [C] of the elements of a pack that begins at `p`.
template <typename A, int SIZE>
__device__ void pick(const A *bias, Place p, int64_t channels, int64_t inner, A (&picked)[SIZE]) {
    if (inner % SIZE == 0) {
        const A same = bias[p.channel];
        for (int j = 0; j < SIZE; j++) picked[j] = same;
        return;
    }
    for (int j = 0; j < SIZE; j++) {
        picked[j] = bias[p.channel];
        if (++p.inner == inner) {
            p.inner = 0;
            if (++p.channel == channels) p.channel = 0;
        }
    }
}

// y = formula(x + bias) for x [A,C,B] of `count` elements, and the codes of its packs unless `codes` is null.
// A step moves the place by `shift`: no division in the loop. Channels last, where C divides the step, have the same
// biases at every step. 32 registers, so that 2048 threads fit; with the shift in registers too it would be 40.
template <typename T>
__global__ void __launch_bounds__(THREADS) value(const T *x, const Wide<T> *bias, T *y, uint16_t *codes, int64_t count,
                                                 int64_t channels, int64_t inner, Place shift,
                                                 Formula<Wide<T>> formula) {
    constexpr int SIZE = Pack<T>::size;
    int64_t first = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * SIZE;
    const int64_t step = int64_t(gridDim.x) * THREADS * SIZE;
    Place place{first / inner % channels, first % inner};
    Wide<T> biases[SIZE] = {};
    if (bias && first < count) pick(bias, place, channels, inner, biases);
    for (; first < count; first += step) {
        Pack<T> pack = load(x, first, count);
        unsigned code = 0;
        for (int j = 0; j < SIZE; j++)
            pack.at[j] = T(formula.value(Wide<T>(pack.at[j]) + biases[j], j, code));
        store(y, first, count, pack);
        if (codes) codes[first / SIZE] = uint16_t(code);
        if (bias && (shift.channel || shift.inner)) {
            place.inner += shift.inner;
            place.channel += shift.channel;
            if (place.inner >= inner) place.inner -= inner, place.channel++;
            if (place.channel >= channels) place.channel -= channels;
            pick(bias, place, channels, inner, biases);
        }
    }
}

// y = g · the derivative in the codes.
template <typename T>
__global__ void __launch_bounds__(THREADS) gradient(const T *g, const uint16_t *codes, T *y, int64_t count,
                                                    Formula<Wide<T>> formula) {
    constexpr int SIZE = Pack<T>::size;
    const int64_t step = int64_t(gridDim.x) * THREADS * SIZE;
    for (int64_t first = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * SIZE; first < count; first += step) {
        Pack<T> pack = load(g, first, count);
        const unsigned code = codes[first / SIZE];
        for (int j = 0; j < SIZE; j++) pack.at[j] = T(formula.gradient(Wide<T>(pack.at[j]), j, code));
        store(y, first, count, pack);
    }
}

// Blocks that pass over `count` elements together: no more than the device holds at once.
static int64_t blocks(int64_t device, int64_t count, int size) {
    int processors = 1, threads = THREADS;  // of one of them
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, int(device));
    cudaDeviceGetAttribute(&threads, cudaDevAttrMaxThreadsPerMultiProcessor, int(device));
    const int64_t per_block = int64_t(THREADS) * size;
    return std::min((count + per_block - 1) / per_block, int64_t(processors) * (threads / THREADS));
}

extern "C" {

const char *probe(int64_t device, cudaStream_t) { return examine(device, value<float>); }

// x, y: `count` elements [A,channels,inner]; bias [channels] in float (double for double) or null; codes: one for each
// 16 bytes of x, or null. All begin at multiples of 16 bytes. An infinite clamp has no effect.
const char *bias_act(int64_t device, cudaStream_t stream, int64_t dtype, const void *x, const void *bias, void *y,
                     uint16_t *codes, int64_t count, int64_t channels, int64_t inner, double slope, double gain,
                     double clamp) {
    return dispatch(dtype, [=](auto type) {
        using T = typename decltype(type)::type;
        using A = Wide<T>;
        const int64_t grid = blocks(device, count, Pack<T>::size), step = grid * THREADS * Pack<T>::size;
        return launch(device, stream, grid, THREADS, value<T>, static_cast<const T *>(x),
                      static_cast<const A *>(bias), static_cast<T *>(y), codes, count, channels, inner,
                      Place{step / inner % channels, step % inner}, Formula<A>{A(slope), A(gain), A(clamp)});
    });
}

// g -> y, `count` elements each: the gradient of `bias_act` with respect to x; also the gradient of that gradient.
const char *bias_act_gradient(int64_t device, cudaStream_t stream, int64_t dtype, const void *g, const uint16_t *codes,
                              void *y, int64_t count, double slope, double gain) {
    return dispatch(dtype, [=](auto type) {
        using T = typename decltype(type)::type;
        using A = Wide<T>;
        return launch(device, stream, blocks(device, count, Pack<T>::size), THREADS, gradient<T>,
                      static_cast<const T *>(g), codes, static_cast<T *>(y), count,
                      Formula<A>{A(slope), A(gain), A(0)});
    });
}
}
