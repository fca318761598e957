#pragma once

#include "cuda_runtime.h"

// Lane 0 alone holds a fragment and does the work of its warp.
namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
    static_assert(M == 16 && N == 16 && K == 16);
    float at[16][16];
};

inline bool leads(const void *memory) {
    if (uintptr_t(memory) % 32) emulator::fail("a fragment is not aligned");
    return threadIdx.x % 32 == 0;
}

template <typename F>
void fill_fragment(F &f, float value) {
    for (auto &row : f.at)
        for (float &x : row) x = value;
}

template <typename Use, typename T, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout> &f, const T *from, unsigned pitch) {
    if (!leads(from)) return;
    for (int r = 0; r < 16; r++)
        for (int c = 0; c < 16; c++)
            f.at[r][c] = float(std::is_same_v<Layout, row_major> ? from[r * pitch + c] : from[c * pitch + r]);
}

template <typename A, typename B, typename C>
void mma_sync(C &d, const A &a, const B &b, const C &c) {
    if (threadIdx.x % 32) return;
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            float sum = c.at[i][j];
            for (int k = 0; k < 16; k++) sum += a.at[i][k] * b.at[k][j];
            d.at[i][j] = sum;
        }
}

template <typename C>
void store_matrix_sync(float *to, const C &f, unsigned pitch, layout_t) {
    if (!leads(to)) return;
    for (int r = 0; r < 16; r++)
        for (int c = 0; c < 16; c++) to[r * pitch + c] = f.at[r][c];
}

}  // namespace nvcuda::wmma
