// lowpass on a CPU (see resample.py), with channels last: both axes in one pass over memory.

#include "bfloat.h"
#include "parallel.h"

#include <algorithm>

constexpr float TAPS[] = {0.125f, 0.375f, 0.375f, 0.125f};

// The inputs of each output along an axis, and their weights; where there are fewer than four, one again with weight 0.
struct Axis {
    struct Output {
        int64_t input[4] = {};
        float weight[4] = {};
    };
    std::vector<Output> outputs;

    // `wide` inputs become `narrow` outputs: o reads those from o·stride − padding on. The adjoint turns them around.
    Axis(int64_t wide, int64_t narrow, int64_t padding, int64_t stride, bool adjoint) : outputs(adjoint ? wide : narrow) {
        std::vector<int64_t> counts(outputs.size());
        for (int64_t o = 0; o < narrow; o++)
            for (int64_t t = 0; t < 4; t++) {
                const int64_t i = o * stride - padding + t;
                if (i < 0 || i >= wide) continue;
                int64_t &count = counts[adjoint ? i : o];
                Output &output = outputs[adjoint ? i : o];
                output.weight[count] = TAPS[t];
                std::fill(output.input + count++, output.input + 4, adjoint ? o : i);
            }
    }
};

// y[i] = the weighted sum of x[input · step + i] over the inputs of an output.
template <typename T, typename U>
static void gather(const Axis::Output &output, const T *x, int64_t step, U *__restrict y, int64_t count) {
    const T *a = x + output.input[0] * step, *b = x + output.input[1] * step;
    const T *c = x + output.input[2] * step, *d = x + output.input[3] * step;
    const auto [p, q, r, s] = output.weight;
    for (int64_t i = 0; i < count; i++) y[i] = U(p * float(a[i]) + q * float(b[i]) + r * float(c[i]) + s * float(d[i]));
}

template <typename T>
static void lowpass(int64_t threads, const T *x, T *y, int64_t images, int64_t channels, const Axis &rows,
                    const Axis &cols, int64_t height, int64_t width) {
    const int64_t line = width * channels, high = rows.outputs.size(), group = std::max<int64_t>(1, CHUNK / line);
    parallel((images * high + group - 1) / group, threads, [=, &rows, &cols](int64_t part) {
        std::vector<float> filtered(line);
        for (int64_t row = part * group; row < std::min(images * high, (part + 1) * group); row++) {
            gather(rows.outputs[row % high], x + row / high * height * line, line, filtered.data(), line);
            T *to = y + row * int64_t(cols.outputs.size()) * channels;
            for (const Axis::Output &output : cols.outputs) {
                gather(output, filtered.data(), channels, to, channels);
                to += channels;
            }
        }
    });
}

extern "C" {

// x [images,height,width,channels], float (1) or bfloat16 (3). `narrow` is a size after the filter, `wide` one before.
const char *lowpass(int64_t threads, void *, int64_t dtype, const void *x, void *y, int64_t images, int64_t channels,
                    int64_t wide_height, int64_t wide_width, int64_t narrow_height, int64_t narrow_width,
                    int64_t padding, int64_t stride, int64_t adjoint) {
    const Axis rows(wide_height, narrow_height, padding, stride, adjoint);
    const Axis cols(wide_width, narrow_width, padding, stride, adjoint);
    const int64_t height = adjoint ? narrow_height : wide_height, width = adjoint ? narrow_width : wide_width;
    if (dtype == 1)
        lowpass(threads, static_cast<const float *>(x), static_cast<float *>(y), images, channels, rows, cols, height, width);
    else
        lowpass(threads, static_cast<const BFloat *>(x), static_cast<BFloat *>(y), images, channels, rows, cols, height, width);
    return nullptr;
}
}
