// A chain of folded layers on a CPU (see chain.py): strips of positions pass through all layers and stay in the cache;
// each product keeps its sums in registers.
//
// Legend: O outputs, I inputs, P positions. A strip is [channels][WIDE] vectors of LANES positions each.

#include "folded.h"

#include <algorithm>
#include <cstring>

// ROWS x WIDE sums, WIDE inputs and one weight fit into the registers: 32 of 16 floats, 16 of 8, or (NEON) 32 of 4.
constexpr int ROWS = LANES == 8 ? 4 : 6, WIDE = LANES == 8 ? 3 : 4;
constexpr int64_t STRIP = LANES * WIDE;

// y[0 … N-1] of `layer` from x [I], with weights [I][N].
template <int N>
static void outputs(const Folded &layer, const float *weight, const float *bias, const Vector *x, Vector *y) {
    Vector sums[N][WIDE];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 4
        for (int j = 0; j < WIDE; j++) sums[n][j] = Vector{} + bias[n];
    for (int64_t i = 0; i < layer.inputs; i++, weight += N, x += WIDE)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++)
#pragma GCC unroll 4
            for (int j = 0; j < WIDE; j++) sums[n][j] += x[j] * weight[n];
    const Vector high = Vector{} + layer.clamp, low = -high;
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 4
        for (int j = 0; j < WIDE; j++) {
            Vector v = sums[n][j];
            v = v < 0 ? v * layer.slope : v;
            v = v > high ? high : v;  // comparisons with NaN are false: it stays
            y[n * WIDE + j] = v < low ? low : v;
        }
}

static void apply(const Folded &layer, const Vector *x, Vector *y) {
    const float *weight = layer.weight;
    int64_t o = 0;
    for (; o + ROWS <= layer.outputs; o += ROWS, weight += ROWS * layer.inputs)
        outputs<ROWS>(layer, weight, layer.bias + o, x, y + o * WIDE);
    for (; o < layer.outputs; o++, weight += layer.inputs) outputs<1>(layer, weight, layer.bias + o, x, y + o * WIDE);
}

extern "C" {

extern const int64_t chain_rows = ROWS, chain_strip = STRIP;

// x [I,P], terms [O,P] each -> sums, [branches,O,P], or [O,P] of the last branch with `every` = 0, in this thread.
// weights: groups of ROWS outputs, [I][ROWS] each; then the remaining outputs, [I] each.
// space: (2·widest + 2·O of the branches) · STRIP floats at a multiple of 64 bytes, finite.
const char *chain(int64_t, void *, const Folded *layers, int64_t count, const float *x, const float *const *terms,
                  float *sums, int64_t every, int64_t positions, float *space, int64_t widest, int64_t branch_outputs) {
    Vector *sum = reinterpret_cast<Vector *>(space), *addend = sum + branch_outputs * WIDE;
    for (int64_t p = 0; p < positions; p += STRIP) {
        const int64_t n = std::min(STRIP, positions - p);
        Vector *in = addend + branch_outputs * WIDE, *out = in + widest * WIDE;
        for (int64_t c = 0; c < layers[0].inputs; c++)
            std::memcpy(in + c * WIDE, x + c * positions + p, n * sizeof(float));
        std::fill(sum, sum + branch_outputs * WIDE, Vector{});
        const float *const *term = terms;
        float *result = sums + p;
        for (const Folded *layer = layers; layer < layers + count; layer++) {
            if (layer->branch) {
                apply(*layer, in, addend);
                for (int64_t i = 0; i < branch_outputs * WIDE; i++) sum[i] += addend[i];
                for (int64_t c = 0; c < branch_outputs; c++)
                    std::memcpy(result + c * positions, sum + c * WIDE, n * sizeof(float));
                result += every * branch_outputs * positions;
            } else {
                apply(*layer, in, out);
                std::swap(in, out);
                if (!layer->term) continue;
                for (int64_t c = 0; c < layer->outputs; c++) {
                    const float *from = *term + c * positions + p;
                    float *to = reinterpret_cast<float *>(in + c * WIDE);
                    for (int64_t j = 0; j < n; j++) to[j] += from[j];
                }
                term++;
            }
        }
    }
    return nullptr;
}
}
