// Enough of CUDA to run this project's kernels on a CPU, so that tests can: one block after the other, the threads of a
// block as fibers that switch where they wait for each other. Copies that a thread starts asynchronously arrive no
// earlier than it waits for them; threads run in one order, then in the other, so that what is not waited for shows.

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

// --- launching --------------------------------------------------------------------------------------------------------

using cudaStream_t = void *;
enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxThreadsPerMultiProcessor };
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};
struct cudaFuncAttributes {};
inline const char *cudaGetErrorString(cudaError_t error) { return error ? "invalid device ordinal" : "no error"; }
inline cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    return *value = attribute == cudaDevAttrMultiProcessorCount ? 1 : 2048, cudaSuccess;
}

template <typename F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *, F *) {
    return cudaSuccess;
}

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(P...), A... arguments) {
    gridDim = config->gridDim, blockDim = config->blockDim;
    emulator::body = [=] { kernel(arguments...); };
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) emulator::run_block(blockDim.x);
    return cudaSuccess;
}
