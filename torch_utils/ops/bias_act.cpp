// bias_act on a CPU (see bias_act.py): one pass over memory, and one for the gradient.

#include "bfloat.h"
#include "parallel.h"

#include <algorithm>
#include <cmath>

constexpr int64_t BLOCK = 1024;

struct Formula {
    float slope, gain, clamp;
};

// What derivatives need of an element.
enum Code : int8_t { CLAMPED, NEGATIVE, POSITIVE };  // v <= 0 or NaN; v > 0

// y = clamp(gain · (v > 0 ? v : slope · v), ±clamp) with v = x + bias, and the codes.
template <int STEP, typename T>  // of the bias: 0 is one number for all
static void value(const T *__restrict x, const float *__restrict bias, T *__restrict y, int8_t *__restrict codes,
                  int64_t count, Formula f) {
    for (int64_t i = 0; i < count; i++) {
        const float sum = float(x[i]) + bias[i * STEP];
        const float v = (sum > 0 ? sum : sum * f.slope) * f.gain;
        const float top = v > f.clamp ? f.clamp : v;  // NaN propagates
        y[i] = T(top < -f.clamp ? -f.clamp : top);
        const int sign = sum > 0 ? POSITIVE : NEGATIVE;
        codes[i] = int8_t(std::fabs(v) > f.clamp ? CLAMPED : sign);
    }
}

template <typename T>
static void bias_act(int64_t threads, const T *x, const float *bias, T *y, int8_t *codes, int64_t count,
                     int64_t channels, int64_t inner, Formula f) {
    // A row has one bias, or (channels last) the biases of `tiled`: all of them, repeated to at least a BLOCK.
    std::vector<float> tiled(1);
    for (int64_t i = 0; bias && inner == 1 && (i < BLOCK || i % channels); i++) tiled.resize(i + 1), tiled[i] = bias[i % channels];
    const bool last = bias && inner == 1;
    const int64_t row = last ? tiled.size() : bias ? inner : BLOCK, rows = (count + row - 1) / row;
    const int64_t group = std::max<int64_t>(1, CHUNK / row);
    parallel((rows + group - 1) / group, threads, [=, &tiled](int64_t g) {
        int8_t unused[BLOCK];
        for (int64_t r = g * group; r < std::min(rows, (g + 1) * group); r++)
            for (int64_t i = 0; i < std::min(row, count - r * row); i += BLOCK) {
                const int64_t first = r * row + i, n = std::min({BLOCK, row - i, count - first});
                int8_t *code = codes ? codes + first : unused;
                if (last)
                    value<1>(x + first, tiled.data() + i, y + first, code, n, f);
                else
                    value<0>(x + first, bias ? bias + r % channels : tiled.data(), y + first, code, n, f);
            }
    });
}

template <typename T>
static void gradient(int64_t threads, const T *g, const int8_t *codes, T *y, int64_t count, Formula f) {
    parallel((count + CHUNK - 1) / CHUNK, threads, [=](int64_t chunk) {
        for (int64_t i = chunk * CHUNK; i < std::min(count, (chunk + 1) * CHUNK); i++) {
            const float steep = float(g[i]) * f.gain, flat = steep * f.slope;
            const float moved = codes[i] == POSITIVE ? steep : flat;
            y[i] = T(codes[i] == CLAMPED ? 0.0f : moved);
        }
    });
}

extern "C" {

// As in bias_act.cu, for float (1) and bfloat16 (3), with a code of one byte for each element.
const char *bias_act(int64_t threads, void *, int64_t dtype, const void *x, const float *bias, void *y, int8_t *codes,
                     int64_t count, int64_t channels, int64_t inner, double slope, double gain, double clamp) {
    const Formula f{float(slope), float(gain), float(clamp)};
    if (dtype == 1)
        bias_act(threads, static_cast<const float *>(x), bias, static_cast<float *>(y), codes, count, channels, inner, f);
    else
        bias_act(threads, static_cast<const BFloat *>(x), bias, static_cast<BFloat *>(y), codes, count, channels, inner, f);
    return nullptr;
}

const char *bias_act_gradient(int64_t threads, void *, int64_t dtype, const void *g, const int8_t *codes, void *y,
                              int64_t count, double slope, double gain) {
    const Formula f{float(slope), float(gain), 0};
    if (dtype == 1)
        gradient(threads, static_cast<const float *>(g), codes, static_cast<float *>(y), count, f);
    else
        gradient(threads, static_cast<const BFloat *>(g), codes, static_cast<BFloat *>(y), count, f);
    return nullptr;
}
}
