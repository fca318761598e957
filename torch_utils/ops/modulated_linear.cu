// The kernels of modulated_linear (see modulated_linear.py).
//
// Legend: N images, P positions, I inputs, O outputs.

#include "kernels.h"
#include "tensor_cores.h"

// --- the weights of all images ---------------------------------------------------------------------------------------

constexpr int THREADS = 256;

// weight [O,I], style [N,I] -> out[n,o,i] = weight[o,i] · style[n,i], with `demodulate` divided by its length over i,
// whose square gets `epsilon`. A warp makes one of the `count` rows [n,o].
extern "C" __global__ void __launch_bounds__(THREADS) modulate(const Wide *weight, const Wide *style, T *out,
                                                               int64_t count, int64_t outputs, int64_t inputs,
                                                               int64_t demodulate, Wide epsilon) {
    const int64_t row = (int64_t(blockIdx.x) * THREADS + threadIdx.x) / 32;
    if (row >= count) return;
    const int lane = threadIdx.x % 32;
    weight += row % outputs * inputs;
    style += row / outputs * inputs;
    Wide scale = 1;
    if (demodulate) {
        Wide sum = 0;
        for (int64_t i = lane; i < inputs; i += 32) {
            const Wide modulated = weight[i] * style[i];
            sum += modulated * modulated;
        }
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        scale = 1 / sqrt(sum + epsilon);
    }
    for (int64_t i = lane; i < inputs; i += 32) out[row * inputs + i] = T(weight[i] * style[i] * scale);
}

// --- the product on tensor cores -------------------------------------------------------------------------------------

#if TYPE >= 2 && __CUDA_ARCH__ >= 800  // for half types; older devices have no fragments of bfloat16

// A block makes ROWS positions × COLS outputs, DEPTH inputs at a time; its 2 × 2 warps make 64 × 32 each, as 4 × 2
// fragments of 16 × 16. While it multiplies one stage, it fetches the next.
constexpr int ROWS = 128, COLS = 64, DEPTH = 32, WARPS = 4;
constexpr int PITCH = DEPTH + 8;  // 8 rows of 80 bytes begin in different banks

struct alignas(16) Floats {
    float at[8];
};

struct alignas(128) Stage {
    T at[(ROWS + COLS) * PITCH];  // positions, then outputs, DEPTH inputs each
};

// x [N,P,I], weight [N,O,I], bias [O] -> y[n,p,o] = formula(Σ_i x[n,p,i] · weight[n,o,i] + bias[o]), and the codes of its
// packs unless `codes` is null. I and O are multiples of 8; all begin at multiples of 16 bytes.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 4)
    modulated_product(const T *x, const T *weight, const float *bias, T *y, uint16_t *codes, int64_t positions,
                      int64_t inputs, int64_t outputs, float slope, float gain, float clamp) {
    const Formula formula{slope, gain, clamp};
    __shared__ Stage stages[2];

    // Tiles of the same positions are neighbours, so that x is read from memory once. Blocks fit into 31 bits.
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
            copy_async(stage + (line + j * STRIDE) * PITCH + input, from[j] + depth, zeros);
        commit();
    };

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int top = warp / 2 * 64, left = warp % 2 * 32;  // of the warp's part of the tile
    Sum sums[4][2];

    fetch(stages[0].at, 0);
    for (int64_t depth = 0; depth < inputs; depth += DEPTH) {
        const int present = depth / DEPTH % 2;
        if (depth + DEPTH < inputs) {
            fetch(stages[1 - present].at, depth + DEPTH);
            wait<1>();
        } else {
            wait<0>();
        }
        __syncthreads();  // the fetches of all threads are complete
        for (int k = 0; k < DEPTH; k += 16) {
            const T *stage = stages[present].at + k;
            Left a[4];
            Right b[2];
            for (int i = 0; i < 4; i++) a[i].load(stage + (top + 16 * i) * PITCH, PITCH);
            for (int j = 0; j < 2; j++) b[j].load(stage + (ROWS + left + 16 * j) * PITCH, PITCH);
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 2; j++) sums[i][j].add(a[i], b[j]);
        }
        __syncthreads();  // all threads have read this stage
    }

    constexpr int STRIP = 32 + 4;  // 16 rows of sums, which begin in different banks, reuse the memory of the stages
    static_assert(sizeof(stages) >= WARPS * 16 * STRIP * sizeof(float));
    float *strip = reinterpret_cast<float *>(stages) + warp * 16 * STRIP;
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < 2; j++) sums[i][j].store(strip + 16 * j, STRIP);
        __syncwarp();
        for (int pack = lane; pack < 16 * 4; pack += 32) {
            const int64_t p = row + top + 16 * i + pack / 4, o = col + left + pack % 4 * 8;
            if (p >= positions || o >= outputs) continue;
            const Floats sum = *reinterpret_cast<const Floats *>(strip + pack / 4 * STRIP + pack % 4 * 8);
            const Floats add = *reinterpret_cast<const Floats *>(bias + o);
            const int64_t place = (n * positions + p) * outputs + o;
            Pack result;
            unsigned code = 0;
            for (int j = 0; j < 8; j++) result.at[j] = T(formula.value(sum.at[j] + add.at[j], j, code));
            put(y + place, result);
            if (codes) codes[place / 8] = uint16_t(code);
        }
        __syncwarp();  // before the next 16 rows
    }
}
#endif
