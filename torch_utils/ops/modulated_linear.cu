// The kernels of modulated_linear (see modulated_linear.py).
//
// Legend: N images, P positions, I inputs, O outputs.

#include "bias_act.h"

#include <cuda_pipeline_primitives.h>
#include <mma.h>

using namespace nvcuda::wmma;

// --- the weights of all images ---------------------------------------------------------------------------------------

constexpr int THREADS = 256;

// out[n,o,i] = weight[o,i] · style[n,i], with `demodulate` divided by its length over i, whose square gets `epsilon`.
// A warp makes one row [n,o].
template <typename A, typename T>
__global__ void __launch_bounds__(THREADS) rows(const A *weight, const A *style, T *out, int64_t count, int64_t outputs,
                                                int64_t inputs, int64_t demodulate, A epsilon) {
    const int64_t row = (int64_t(blockIdx.x) * THREADS + threadIdx.x) / 32;
    if (row >= count) return;
    const int lane = threadIdx.x % 32;
    weight += row % outputs * inputs;
    style += row / outputs * inputs;
    A scale = 1;
    if (demodulate) {
        A sum = 0;
        for (int64_t i = lane; i < inputs; i += 32) {
            const A modulated = weight[i] * style[i];
            sum += modulated * modulated;
        }
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        scale = 1 / sqrt(sum + epsilon);
    }
    for (int64_t i = lane; i < inputs; i += 32) out[row * inputs + i] = T(weight[i] * style[i] * scale);
}

// --- the product on tensor cores -------------------------------------------------------------------------------------

// A block makes ROWS positions × COLS outputs, DEPTH inputs at a time; its 2 × 2 warps make 64 × 32 each, as 4 × 2
// fragments of 16 × 16. While it multiplies one stage, it fetches the next.
constexpr int ROWS = 128, COLS = 64, DEPTH = 32, WARPS = 4;
constexpr int PITCH = DEPTH + 8;  // 8 rows of 80 bytes begin in different banks

struct alignas(16) Floats {
    float at[8];
};

template <typename T>
struct alignas(128) Stage {
    T at[(ROWS + COLS) * PITCH];  // positions, then outputs, DEPTH inputs each
};

// A fragment from a stage. nvcc does not see that those of bfloat16 come from shared memory, and would load each by 4
// instructions instead of 1.
template <typename F, typename T>
__device__ void load(F &to, const T *from) {
    load_matrix_sync(to, from, PITCH);
}
#if __CUDA_ARCH__ >= 800
#define LOAD_SHARED(WHICH, ORDER)                                                                                      \
    __device__ inline void load(fragment<matrix_##WHICH, 16, 16, 16, __nv_bfloat16, ORDER##_major> &to,                \
                                const __nv_bfloat16 *from) {                                                           \
        unsigned *bits = reinterpret_cast<unsigned *>(to.x);                                                           \
        asm volatile("wmma.load." #WHICH ".sync.aligned." #ORDER ".m16n16k16.shared.bf16 {%0, %1, %2, %3}, [%4], %5;"  \
                     : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])                                      \
                     : "r"(unsigned(__cvta_generic_to_shared(from))), "n"(PITCH)                                       \
                     : "memory");                                                                                      \
    }
LOAD_SHARED(a, row)
LOAD_SHARED(b, col)
#endif

// y[n,p,o] = formula(Σ_i x[n,p,i] · weight[n,o,i] + bias[o]), and the codes of its packs unless `codes` is null.
// I and O are multiples of 8.
template <typename T>
__global__ void __launch_bounds__(32 * WARPS, 4) product(const T *x, const T *weight, const float *bias, T *y,
                                                      uint16_t *codes, int64_t positions, int64_t inputs,
                                                      int64_t outputs, Formula<float> formula) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800  // older devices have no fragments of bfloat16
    __shared__ Stage<T> stages[2];

    // Tiles of the same positions are neighbours, so that x is read from memory once. Blocks fit into 32 bits (`launch`).
    const unsigned across = unsigned((outputs + COLS - 1) / COLS), down = unsigned((positions + ROWS - 1) / ROWS);
    const int64_t col = int64_t(blockIdx.x % across) * COLS, row = int64_t(blockIdx.x / across % down) * ROWS;
    const int64_t n = blockIdx.x / across / down;

    // A thread fetches 16 bytes of every STRIDEth line, or of the last one where there is none: its sums are not stored.
    constexpr int STRIDE = 32 * WARPS * 8 / DEPTH;
    const int line = threadIdx.x / (DEPTH / 8), input = threadIdx.x % (DEPTH / 8) * 8;
    const T *from[(ROWS + COLS) / STRIDE];
    for (int j = 0; j < ROWS / STRIDE; j++)
        from[j] = x + (n * positions + min(row + line + j * STRIDE, positions - 1)) * inputs + input;
    for (int j = 0; j < COLS / STRIDE; j++)
        from[ROWS / STRIDE + j] = weight + (n * outputs + min(col + line + j * STRIDE, outputs - 1)) * inputs + input;

    auto fetch = [&](T *stage, int64_t depth) {
        const int zeros = depth + input < inputs ? 0 : 16;
        for (int j = 0; j < (ROWS + COLS) / STRIDE; j++)
            __pipeline_memcpy_async(stage + (line + j * STRIDE) * PITCH + input, from[j] + depth, 16, zeros);
        __pipeline_commit();
    };

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int top = warp / 2 * 64, left = warp % 2 * 32;  // of the warp's part of the tile
    fragment<accumulator, 16, 16, 16, float> sums[4][2];
    for (auto &pair : sums)
        for (auto &sum : pair) fill_fragment(sum, 0.0f);

    fetch(stages[0].at, 0);
    for (int64_t depth = 0; depth < inputs; depth += DEPTH) {
        const int present = depth / DEPTH % 2;
        if (depth + DEPTH < inputs) {
            fetch(stages[1 - present].at, depth + DEPTH);
            __pipeline_wait_prior(1);
        } else {
            __pipeline_wait_prior(0);
        }
        __syncthreads();  // the fetches of all threads are complete
        for (int k = 0; k < DEPTH; k += 16) {
            const T *stage = stages[present].at + k;
            fragment<matrix_a, 16, 16, 16, T, row_major> a[4];
            fragment<matrix_b, 16, 16, 16, T, col_major> b[2];
            for (int i = 0; i < 4; i++) load(a[i], stage + (top + 16 * i) * PITCH);
            for (int j = 0; j < 2; j++) load(b[j], stage + (ROWS + left + 16 * j) * PITCH);
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 2; j++) mma_sync(sums[i][j], a[i], b[j], sums[i][j]);
        }
        __syncthreads();  // all threads have read this stage
    }

    constexpr int STRIP = 32 + 4;  // 16 rows of sums, which begin in different banks, reuse the memory of the stages
    static_assert(sizeof(stages) >= WARPS * 16 * STRIP * sizeof(float));
    float *strip = reinterpret_cast<float *>(stages) + warp * 16 * STRIP;
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < 2; j++) store_matrix_sync(strip + 16 * j, sums[i][j], STRIP, mem_row_major);
        __syncwarp();
        for (int pack = lane; pack < 16 * 4; pack += 32) {
            const int64_t p = row + top + 16 * i + pack / 4, o = col + left + pack % 4 * 8;
            if (p >= positions || o >= outputs) continue;
            const Floats sum = *reinterpret_cast<const Floats *>(strip + pack / 4 * STRIP + pack % 4 * 8);
            const Floats add = *reinterpret_cast<const Floats *>(bias + o);
            const int64_t place = (n * positions + p) * outputs + o;
            Pack<T> result;
            unsigned code = 0;
            for (int j = 0; j < 8; j++) result.at[j] = T(formula.value(sum.at[j] + add.at[j], j, code));
            put(y + place, result);
            if (codes) codes[place / 8] = uint16_t(code);
        }
        __syncwarp();  // before the next 16 rows
    }
#endif
}

template <typename T>
static const char *multiply(int64_t device, cudaStream_t stream, const void *x, const void *weight, const float *bias,
                            void *y, uint16_t *codes, int64_t images, int64_t positions, int64_t inputs,
                            int64_t outputs, Formula<float> formula) {
    const int64_t tiles = (positions + ROWS - 1) / ROWS * ((outputs + COLS - 1) / COLS);
    return launch(device, stream, images * tiles, 32 * WARPS, product<T>, static_cast<const T *>(x),
                  static_cast<const T *>(weight), bias, static_cast<T *>(y), codes, positions, inputs, outputs, formula);
}

extern "C" {

const char *probe(int64_t device, cudaStream_t) { return examine(device, rows<float, float>); }

// weight [O,I], style [N,I] -> out [N,O,I]. weight and style are float (double for a double `out`).
const char *modulate(int64_t device, cudaStream_t stream, int64_t dtype, const void *weight, const void *style,
                     void *out, int64_t images, int64_t outputs, int64_t inputs, int64_t demodulate, double epsilon) {
    const int64_t count = images * outputs, per_block = THREADS / 32;
    return dispatch(dtype, [=](auto type) {
        using T = typename decltype(type)::type;
        using A = Wide<T>;
        return launch(device, stream, (count + per_block - 1) / per_block, THREADS, rows<A, T>,
                      static_cast<const A *>(weight), static_cast<const A *>(style), static_cast<T *>(out), count,
                      outputs, inputs, demodulate, A(epsilon));
    });
}

// x [N,P,I], weight [N,O,I], bias [O] in float -> y [N,P,O] and a code for each 8 of its elements (codes may be null),
// in a half type. I and O are multiples of 8; all tensors begin at multiples of 16 bytes.
const char *modulated_product(int64_t device, cudaStream_t stream, int64_t dtype, const void *x, const void *weight,
                              const float *bias, void *y, uint16_t *codes, int64_t images, int64_t positions,
                              int64_t inputs, int64_t outputs, double slope, double gain, double clamp) {
    const Formula<float> formula{float(slope), float(gain), float(clamp)};
    if (dtype == 2)
        return multiply<__half>(device, stream, x, weight, bias, y, codes, images, positions, inputs, outputs, formula);
    if (dtype == 3)
        return multiply<__nv_bfloat16>(device, stream, x, weight, bias, y, codes, images, positions, inputs, outputs,
                                       formula);
    return "the product on tensor cores is for half types";
}
}
