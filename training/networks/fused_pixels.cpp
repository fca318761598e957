// Lines to colours and back on a CPU (see fused_pixels.py). A strip of positions is a part of a row of an image, or several
// short rows. It stays in the cache through all layers; the gradient recomputes it. Every product is `multiply`.
//
// Legend: N images, K fusions, C channels, D thickness, H rows, W columns. A strip is [channels][WIDE] vectors.

#include "../../torch_utils/ops/folded.h"
#include "../../torch_utils/ops/parallel.h"

#include <algorithm>
#include <cstring>
#include <new>

// ROWS x WIDE sums, WIDE inputs and one weight fit into the registers: 32 of 16 floats, 16 of 8, or (NEON) 32 of 4.
constexpr int ROWS = 6, WIDE = LANES == 8 ? 2 : 4;
constexpr int STRIP = LANES * WIDE;

struct Shape {
    int64_t images, fusions, channels, thickness, height;
    int64_t width;    // of the lines of columns: STRIP is a multiple of it, or it is a multiple of STRIP
    int64_t visible;  // columns that are in the image
    int64_t tall;     // rows of a strip
    int64_t first;    // fusions that are summed before the first layer
    int64_t colours, bands;  // bands of rows: the parts of an image
    int64_t record;          // floats of a part's gradients of weights and biases
};

// --- products --------------------------------------------------------------------------------------------------------

// sums[n][j] += sum over k of a[n·row + k·step] · b[k·depth + j].
template <int N, int M>
static inline void tile(const float *a, int64_t row, int64_t step, const Vector *b, int64_t depth, int64_t inner,
                        Vector (&sums)[N][M]) {
    for (int64_t k = 0; k < inner; k++, a += step, b += depth)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++)
#pragma GCC unroll 4
            for (int j = 0; j < M; j++) sums[n][j] += b[j] * a[n * row];
}

template <int N, int M>
static void block(const float *a, int64_t row, int64_t step, const Vector *b, int64_t depth, int64_t inner, Vector *c,
                  int64_t pitch) {
    Vector sums[N][M];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 4
        for (int j = 0; j < M; j++) sums[n][j] = c[n * pitch + j];
    tile<N, M>(a, row, step, b, depth, inner, sums);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 4
        for (int j = 0; j < M; j++) c[n * pitch + j] = sums[n][j];
}

// c [rows][M, of `pitch`] += a (element n, k at n·row + k·step) times b [inner][M, of `depth`].
template <int M>
static void columns(const float *a, int64_t row, int64_t step, const Vector *b, int64_t depth, int64_t inner, Vector *c,
                    int64_t pitch, int64_t rows) {
    int64_t n = 0;
    for (; n + ROWS <= rows; n += ROWS) block<ROWS, M>(a + n * row, row, step, b, depth, inner, c + n * pitch, pitch);
    for (; n + 2 <= rows; n += 2) block<2, M>(a + n * row, row, step, b, depth, inner, c + n * pitch, pitch);
    if (n < rows) block<1, M>(a + n * row, row, step, b, depth, inner, c + n * pitch, pitch);
}

static void multiply(const float *a, int64_t row, int64_t step, const Vector *b, int64_t inner, Vector *c, int64_t rows,
                     int64_t vectors) {
    int64_t j = 0;
    for (; j + WIDE <= vectors; j += WIDE) columns<WIDE>(a, row, step, b + j, vectors, inner, c + j, vectors, rows);
    for (; j + 2 <= vectors; j += 2) columns<2>(a, row, step, b + j, vectors, inner, c + j, vectors, rows);
    if (j < vectors) columns<1>(a, row, step, b + j, vectors, inner, c + j, vectors, rows);
}

// LANES vectors as a square: rows become columns. Each round interleaves the first half of them with the second.
static void transpose(Vector *v) {
    for (int round = 1; round < LANES; round *= 2) {
        Vector next[LANES];
        for (int i = 0; i < LANES / 2; i++) {
            const Vector a = v[i], b = v[i + LANES / 2];
#if defined(__AVX512F__)
            next[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            next[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX__)
            next[2 * i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
            next[2 * i + 1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
            next[2 * i] = __builtin_shufflevector(a, b, 0, 4, 1, 5);
            next[2 * i + 1] = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
        }
        std::memcpy(v, next, sizeof(next));
    }
}

// The sum over the lanes of each of LANES vectors, which are overwritten.
static Vector across(Vector *v) {
    transpose(v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
}

static int64_t padded(int64_t count) { return (count + LANES - 1) / LANES; }  // in vectors

// --- a part of an image ----------------------------------------------------------------------------------------------

struct Part {
    const Shape &s;
    const Folded *layers;
    int64_t count, image, end;     // end: of this part's rows
    const float *rows, *cols;      // [K,N,H,D,C], [N,K,C,D,W]
    float *rows_grad, *cols_grad;  // as rows; [K,C,D,W] of this part

    // x [C] += fusion k of the strip that begins at column w of row h.
    void fuse(int64_t k, int64_t h, int64_t w, Vector *x) const {
        const int64_t wide = WIDE / s.tall;
        for (int64_t i = 0; i < s.tall; i++) {
            const float *row = rows + line(k, h + i);
            const Vector *col = column(cols, image * s.fusions + k, w);
            Vector *y = x + i * wide;
            for (int64_t c = 0; c < s.channels; c++, y += WIDE)
                for (int64_t d = 0; d < s.thickness; d++, col += s.width / LANES)
                    for (int64_t j = 0; j < wide; j++) y[j] += col[j] * row[d * s.channels + c];
        }
    }

    // The gradients of the lines from that of the fusion, g [C].
    void unfuse(int64_t k, int64_t h, int64_t w, const Vector *g) const {
        const int64_t wide = WIDE / s.tall;
        for (int64_t i = 0; i < s.tall; i++) unfuse_row(k, line(k, h + i), w, g + i * wide, wide);
    }

    void unfuse_row(int64_t k, int64_t at, int64_t w, const Vector *g, int64_t wide) const {
        const int64_t size = s.thickness * s.channels;
        const Vector *col = column(cols, image * s.fusions + k, w);
        Vector *grad = const_cast<Vector *>(column(cols_grad, k, w));
        Vector sums[LANES] = {};
        for (int64_t i = 0; i < size; i++, col += s.width / LANES, grad += s.width / LANES) {  // i is c·D + d
            const int64_t c = i / s.thickness, d = i % s.thickness;
            Vector sum{};
            for (int64_t j = 0; j < wide; j++) {
                sum += col[j] * g[c * WIDE + j];
                grad[j] += g[c * WIDE + j] * rows[at + d * s.channels + c];
            }
            sums[i % LANES] = sum;
            if (i % LANES == LANES - 1 || i == size - 1) {
                const Vector totals = across(sums);
                for (int64_t first = i / LANES * LANES, l = first; l <= i; l++)
                    rows_grad[at + l % s.thickness * s.channels + l / s.thickness] += totals[l - first];
            }
        }
    }

    // Where row h of fusion k begins. A strip may reach beyond the part, where its gradient is 0: its last row serves.
    int64_t line(int64_t k, int64_t h) const {
        return ((k * s.images + image) * s.height + std::min(h, end - 1)) * s.thickness * s.channels;
    }

    const Vector *column(const float *lines, int64_t k, int64_t w) const {
        return reinterpret_cast<const Vector *>(lines + k * s.channels * s.thickness * s.width + w);
    }

    const float *weight(const Folded &layer) const {
        return layer.weight + layer.per_image * image * layer.outputs * layer.inputs;
    }

    // The strip at (h, w) -> colours. x: the input of the chain, then the outputs of the layers; factors: the
    // derivative of each activation.
    template <bool KEEP>
    void forward(int64_t h, int64_t w, Vector *x, Vector *factors, Vector *colours) const {
        const Vector zero{};
        std::fill(x, x + s.channels * WIDE, zero);
        int64_t k = 0;
        while (k < s.first) fuse(k++, h, w, x);
        std::fill(colours, colours + s.colours * WIDE, zero);
        Vector *free = x + s.channels * WIDE;
        for (const Folded *layer = layers; layer < layers + count; layer++) {
            const int64_t size = layer->outputs * WIDE;
            Vector *y = free;
            for (int64_t i = 0; i < size; i++) y[i] = zero + layer->bias[i / WIDE];
            multiply(weight(*layer), layer->inputs, 1, x, layer->inputs, y, layer->outputs, WIDE);
            const Vector high = zero + layer->clamp, low = -high, flat = zero + layer->slope, one = zero + 1.0f;
            for (int64_t i = 0; i < size; i++) {
                Vector v = y[i], factor = v > 0 ? one : flat;
                v = v > 0 ? v : v * flat;
                if (KEEP) factors[i] = (v > high) | (v < low) ? zero : factor;
                v = v > high ? high : v;  // comparisons with NaN are false: it stays
                y[i] = v < low ? low : v;
            }
            factors += KEEP ? size : 0;
            if (layer->branch) {
                for (int64_t i = 0; i < size; i++) colours[i] += y[i];
                continue;
            }
            if (layer->term) fuse(k++, h, w, y);
            x = y;
            free = y + size;
        }
    }

    // From the gradient of the colours of the strip, `colours`, to those of lines and, added to `record`, of weights
    // (inputs padded to vectors) and biases (LANES sums each). `x` and `factors` are the ends of what `forward` left.
    void backward(int64_t h, int64_t w, const Vector *x, const Vector *factors, const Vector *colours, Vector *g,
                  Vector *next, Vector *flipped, Vector *record) const {
        const Vector zero{};
        int64_t k = s.fusions;
        bool fresh = true;  // whether nothing has arrived at x yet
        for (const Folded *layer = layers + count - 1; layer >= layers; layer--) {
            const int64_t size = layer->outputs * WIDE, vectors = padded(layer->inputs);
            factors -= size;
            record -= layer->outputs * (vectors + 1);
            Vector *own = layer->branch ? next : g;  // the gradient before the activation
            if (layer->term) unfuse(--k, h, w, g);
            for (int64_t i = 0; i < size; i++) own[i] = (layer->branch ? colours : g)[i] * factors[i];
            if (!layer->branch) x -= size;
            const Vector *input = x - layer->inputs * WIDE;
            for (int64_t i = 0; i < vectors; i++)
                for (int j = 0; j < WIDE; j++) {
                    Vector square[LANES];
                    for (int l = 0; l < LANES; l++)
                        square[l] = i * LANES + l < layer->inputs ? input[(i * LANES + l) * WIDE + j] : zero;
                    transpose(square);
                    for (int l = 0; l < LANES; l++) flipped[(j * LANES + l) * vectors + i] = square[l];
                }
            multiply(reinterpret_cast<float *>(own), STRIP, 1, flipped, STRIP, record, layer->outputs, vectors);
            Vector *biases = record + layer->outputs * vectors;
            for (int64_t i = 0; i < size; i++) biases[i / WIDE] += own[i];
            Vector *to = layer->branch ? g : next;
            if (!layer->branch || fresh) std::fill(to, to + layer->inputs * WIDE, zero);
            fresh = false;
            multiply(weight(*layer), 1, layer->inputs, own, layer->outputs, to, layer->inputs, WIDE);
            if (!layer->branch) std::swap(g, next);
        }
        while (k > 0) unfuse(--k, h, w, g);
    }
};

extern "C" {

extern const int64_t pixels_strip = STRIP, pixels_lanes = LANES;

// rows [K,N,H,D,C], cols [N,K,C,D,W] -> colours [N,colours,H,visible]; or, from the gradient of the colours, those of
// rows, of cols [N,bands,K,C,D,W] and of the layers [N,bands,record], which are zero before. Pointers to vectors are
// multiples of 64.
const char *pixels(int64_t threads, void *, const Shape *shape, const Folded *layers, int64_t count, const float *rows,
                   const float *cols, float *colours, const float *colours_grad, float *rows_grad, float *cols_grad,
                   float *record) {
    const Shape &s = *shape;
    int64_t outputs = 0, widest = s.channels;
    for (int64_t i = 0; i < count; i++) {
        outputs += layers[i].branch ? 0 : layers[i].outputs;
        widest = std::max({widest, layers[i].outputs, layers[i].inputs});
    }
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i++) kept += layers[i].outputs;
    // x, the output of the last branch, factors, colours, two gradients, a transposed input
    const int64_t inputs = s.channels + outputs, flipped = STRIP * padded(widest);
    const int64_t space = (inputs + s.colours + kept + s.colours + 2 * widest) * WIDE + flipped;
    parallel(s.images * s.bands, threads, [&](int64_t part) {
        const int64_t image = part / s.bands, band = part % s.bands;
        const int64_t line = s.fusions * s.channels * s.thickness * s.width;
        const int64_t end = (band + 1) * s.height / s.bands;
        float *own = colours_grad ? cols_grad + part * line : nullptr;
        const Part p{s, layers, count, image, end, rows, cols, rows_grad, own};
        const auto aligned = std::align_val_t(sizeof(Vector));
        Vector *x = static_cast<Vector *>(operator new(space * sizeof(Vector), aligned));
        std::fill(x, x + space, Vector{});
        Vector *factors = x + (inputs + s.colours) * WIDE, *sums = factors + kept * WIDE, *g = sums + s.colours * WIDE;
        for (int64_t h = band * s.height / s.bands; h < end; h += s.tall)
            for (int64_t w = 0; w < s.visible; w += STRIP) {
                // Between a strip and the rows of an image of which it is made.
                const auto copy = [&](auto move) {
                    const int64_t n = std::min<int64_t>(STRIP / s.tall, s.visible - w) * sizeof(float);
                    for (int64_t c = 0; c < s.colours; c++)
                        for (int64_t i = 0; i < std::min(s.tall, end - h); i++)
                            move(((image * s.colours + c) * s.height + h + i) * s.visible + w,
                                 reinterpret_cast<float *>(sums + c * WIDE) + i * STRIP / s.tall, n);
                };
                if (!colours_grad) {
                    p.forward<false>(h, w, x, factors, sums);
                    copy([&](int64_t at, const float *strip, int64_t n) { std::memcpy(colours + at, strip, n); });
                    continue;
                }
                p.forward<true>(h, w, x, factors, sums);
                std::fill(sums, sums + s.colours * WIDE, Vector{});
                copy([&](int64_t at, float *strip, int64_t n) { std::memcpy(strip, colours_grad + at, n); });
                p.backward(h, w, x + inputs * WIDE, factors + kept * WIDE, sums, g, g + widest * WIDE,
                           g + 2 * widest * WIDE, reinterpret_cast<Vector *>(record + (part + 1) * s.record));
            }
        operator delete(x, aligned);
    });
    return nullptr;
}
}
