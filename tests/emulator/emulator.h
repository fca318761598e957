// Enough of CUDA to run this project's kernels on a CPU, so that tests can: one block after the other, the threads of a
// block as fibers that switch where they wait for each other. Copies that a thread starts asynchronously arrive no
// earlier than it waits for them; threads run in one order, then in the other, so that what is not waited for shows.
// emulator.cpp adds a driver.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct uint4 {
    unsigned x, y, z, w;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3() = default;
    dim3(unsigned x) : x(x) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::min;
using std::sqrt;

// --- numbers ----------------------------------------------------------------------------------------------------------

struct Half {
    _Float16 number;
    Half() = default;
    Half(float value) : number(_Float16(value)) {}
    operator float() const { return float(number); }
};

struct BFloat {
    uint16_t bits;
    BFloat() = default;
    BFloat(float value) {  // to the nearest, and of two to the even
        uint32_t wide;
        std::memcpy(&wide, &value, sizeof(wide));
        bits = value != value ? 0x7fff : uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
    }
    operator float() const {
        const uint32_t wide = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof(wide));
        return value;
    }
};

// --- fibers -----------------------------------------------------------------------------------------------------------

namespace emulator {

enum State { READY, WARP, BLOCK, DONE };  // WARP, BLOCK: it waits for the threads of its warp or block

struct Copy {
    void *to;
    const void *from;  // nullptr: the end of a group
    size_t size, zeros;  // the last of the bytes are zeros
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    State state;
    double slot;  // what it shows to the other lanes
    std::vector<Copy> copies;
    static constexpr size_t STACK = 1 << 17;
};

inline std::vector<Fiber> fibers;
inline unsigned present;
inline ucontext_t scheduler;
inline std::function<void()> body;

inline void fail(const char *what) {
    std::fprintf(stderr, "emulator: %s (block %u, thread %u)\n", what, blockIdx.x, present);
    std::abort();
}

inline void wait(State state) {
    fibers[present].state = state;
    swapcontext(&fibers[present].context, &scheduler);
}

inline void run() {
    body();
    fibers[present].state = DONE;
}

// Tells whether the threads first … first + count - 1 all wait for each other; then they continue.
inline bool release(unsigned first, unsigned count, State state) {
    for (unsigned t = first; t < first + count; t++)
        if (fibers[t].state != state) return false;
    for (unsigned t = first; t < first + count; t++) fibers[t].state = READY;
    return true;
}

inline void run_block(unsigned threads) {
    if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
    for (unsigned t = 0; t < threads; t++) {
        Fiber &fiber = fibers[t];
        fiber.state = READY;
        fiber.copies.clear();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = Fiber::STACK;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, run, 0);
    }
    for (unsigned round = blockIdx.x;; round++) {
        bool moved = false;
        for (unsigned i = 0; i < threads; i++) {
            present = round % 2 ? threads - 1 - i : i;
            if (fibers[present].state != READY) continue;
            moved = true;
            threadIdx.x = present;
            swapcontext(&scheduler, &fibers[present].context);
        }
        for (unsigned warp = 0; warp < threads; warp += 32) moved |= release(warp, 32, WARP);
        moved |= release(0, threads, BLOCK);
        if (!moved) break;
    }
    for (present = 0; present < threads; present++)
        if (fibers[present].state != DONE) fail("it waits for threads that do not come");
}

}  // namespace emulator

inline void __stcg(uint4 *to, uint4 value) {
    if (uintptr_t(to) % sizeof(uint4)) emulator::fail("a store is not aligned");
    std::memcpy(to, &value, sizeof(value));
}

inline void __syncthreads() { emulator::wait(emulator::BLOCK); }
inline void __syncwarp() { emulator::wait(emulator::WARP); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    emulator::fibers[emulator::present].slot = value;
    __syncwarp();
    value = T(emulator::fibers[emulator::present ^ mask].slot);
    __syncwarp();
    return value;
}

// --- tensor_cores.h ---------------------------------------------------------------------------------------------------

inline void copy_async(void *to, const void *from, int zeros) {
    if (uintptr_t(to) % 16 || uintptr_t(from) % 16) emulator::fail("an asynchronous copy is not aligned");
    emulator::fibers[emulator::present].copies.push_back({to, from, 16, size_t(zeros)});
}

inline void commit() { emulator::fibers[emulator::present].copies.push_back({nullptr, nullptr, 0, 0}); }

template <int PRIOR>
void wait() {
    auto &copies = emulator::fibers[emulator::present].copies;
    int groups = 0;
    for (const auto &copy : copies) groups += !copy.from;
    auto copy = copies.begin();
    for (; groups > PRIOR; copy++) {
        groups -= !copy->from;
        if (!copy->from) continue;
        const size_t bytes = copy->size - copy->zeros;
        std::memcpy(copy->to, copy->from, bytes);
        std::memset(static_cast<char *>(copy->to) + bytes, 0, copy->zeros);
    }
    copies.erase(copies.begin(), copy);
}

// Lane 0 alone holds a matrix and does the work of its warp.
inline bool leads(const void *memory) {
    if (uintptr_t(memory) % 32) emulator::fail("a fragment is not aligned");
    return threadIdx.x % 32 == 0;
}

struct Left {
    float at[16][16];
    template <typename T>
    void load(const T *from, int pitch) {
        if (!leads(from)) return;
        for (int r = 0; r < 16; r++)
            for (int c = 0; c < 16; c++) at[r][c] = float(from[r * pitch + c]);
    }
};

struct Right {
    float at[16][16];
    template <typename T>
    void load(const T *from, int pitch) {
        if (!leads(from)) return;
        for (int r = 0; r < 16; r++)
            for (int c = 0; c < 16; c++) at[r][c] = float(from[c * pitch + r]);
    }
};

struct Sum {
    float at[16][16] = {};
    void add(const Left &a, const Right &b) {
        if (threadIdx.x % 32) return;
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 16; j++)
                for (int k = 0; k < 16; k++) at[i][j] += a.at[i][k] * b.at[k][j];
    }
    void store(float *to, int pitch) const {
        if (!leads(to)) return;
        for (int r = 0; r < 16; r++)
            for (int c = 0; c < 16; c++) to[r * pitch + c] = at[r][c];
    }
};

// --- launching --------------------------------------------------------------------------------------------------------

namespace emulator {

// `parameters` holds a pointer to each argument, as for cuLaunchKernel.
template <typename... P, size_t... I>
void launch(void (*kernel)(P...), unsigned blocks, unsigned threads, void **parameters, std::index_sequence<I...>) {
    gridDim = blocks, blockDim = threads;
    body = [=] { kernel(*static_cast<P *>(parameters[I])...); };
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) run_block(threads);
}

template <typename... P>
void launch(void (*kernel)(P...), unsigned blocks, unsigned threads, void **parameters) {
    launch(kernel, blocks, threads, parameters, std::index_sequence_for<P...>());
}

}  // namespace emulator
