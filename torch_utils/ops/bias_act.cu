// bias_act on a GPU (see bias_act.py). It is bound by memory, so it loads and stores 16 bytes at a time.

#include "kernels.h"

constexpr int THREADS = 256;

__device__ Pack load(const T *x, int64_t first, int64_t count) {
    if (first + Pack::size <= count) return get(x + first);
    Pack pack;
#pragma unroll
    for (int j = 0; j < pack.size; j++) pack.at[j] = first + j < count ? x[first + j] : T(0.0f);
    return pack;
}

__device__ void store(T *y, int64_t first, int64_t count, const Pack &pack) {
    if (first + pack.size <= count) {
        put(y + first, pack);
        return;
    }
#pragma unroll
    for (int j = 0; j < pack.size; j++)
        if (first + j < count) y[first + j] = pack.at[j];
}

// The bias [C] of the elements of a pack that begins at channel c and index b of [A,C,B] = [·,channels,inner].
__device__ void pick(const Wide *bias, int64_t c, int64_t b, int64_t channels, int64_t inner,
                     Wide (&picked)[Pack::size]) {
    if (inner % Pack::size == 0) {
        const Wide same = bias[c];
        for (int j = 0; j < Pack::size; j++) picked[j] = same;
        return;
    }
    for (int j = 0; j < Pack::size; j++) {
        picked[j] = bias[c];
        if (++b == inner) {
            b = 0;
            if (++c == channels) c = 0;
        }
    }
}

extern "C" {

// y = formula(x + bias) for x [A,channels,inner] of `count` elements, and the codes of its packs unless `codes` is null;
// the bias [channels] may be null too. All begin at multiples of 16 bytes. An infinite clamp has no effect.
// A step moves the place in [channels,inner] by the `shift`: no division in the loop. Channels last, where C divides the
// step, have the same biases at every step. 32 registers, so that 2048 threads fit; with the shift in them it would be 40.
__global__ void __launch_bounds__(THREADS) bias_act(const T *x, const Wide *bias, T *y, uint16_t *codes, int64_t count,
                                                    int64_t channels, int64_t inner, int64_t shift_channel,
                                                    int64_t shift_inner, Wide slope, Wide gain, Wide clamp) {
    constexpr int SIZE = Pack::size;
    const Formula formula{slope, gain, clamp};
    int64_t first = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * SIZE;
    const int64_t step = int64_t(gridDim.x) * THREADS * SIZE;
    int64_t c = first / inner % channels, b = first % inner;
    Wide biases[SIZE] = {};
    if (bias && first < count) pick(bias, c, b, channels, inner, biases);
    for (; first < count; first += step) {
        Pack pack = load(x, first, count);
        unsigned code = 0;
        for (int j = 0; j < SIZE; j++) pack.at[j] = T(formula.value(Wide(pack.at[j]) + biases[j], j, code));
        store(y, first, count, pack);
        if (codes) codes[first / SIZE] = uint16_t(code);
        if (bias && (shift_channel || shift_inner)) {
            b += shift_inner;
            c += shift_channel;
            if (b >= inner) b -= inner, c++;
            if (c >= channels) c -= channels;
            pick(bias, c, b, channels, inner, biases);
        }
    }
}

// g -> y, `count` elements each: the gradient of `bias_act` with respect to x; also the gradient of that gradient.
__global__ void __launch_bounds__(THREADS) bias_act_gradient(const T *g, const uint16_t *codes, T *y, int64_t count,
                                                             Wide slope, Wide gain) {
    constexpr int SIZE = Pack::size;
    const Formula formula{slope, gain, 0};
    const int64_t step = int64_t(gridDim.x) * THREADS * SIZE;
    for (int64_t first = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * SIZE; first < count; first += step) {
        Pack pack = load(g, first, count);
        const unsigned code = codes[first / SIZE];
        for (int j = 0; j < SIZE; j++) pack.at[j] = T(formula.gradient(Wide(pack.at[j]), j, code));
        store(y, first, count, pack);
    }
}
}
