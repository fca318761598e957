#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void *to, const void *from, size_t size, size_t zeros = 0) {
    if (uintptr_t(to) % size || uintptr_t(from) % size) emulator::fail("an asynchronous copy is not aligned");
    emulator::fibers[emulator::present].copies.push_back({to, from, size, zeros});
}

inline void __pipeline_commit() { emulator::fibers[emulator::present].copies.push_back({nullptr, nullptr, 0, 0}); }

// All groups but the last `prior` arrive.
inline void __pipeline_wait_prior(size_t prior) {
    auto &copies = emulator::fibers[emulator::present].copies;
    size_t groups = 0;
    for (const auto &copy : copies) groups += !copy.from;
    auto copy = copies.begin();
    for (; groups > prior; copy++) {
        groups -= !copy->from;
        if (!copy->from) continue;
        const size_t bytes = copy->size - copy->zeros;
        std::memcpy(copy->to, copy->from, bytes);
        std::memset(static_cast<char *>(copy->to) + bytes, 0, copy->zeros);
    }
    copies.erase(copies.begin(), copy);
}
