// Runs work on threads that end with it. Unlike OpenMP's, they never spin while another process has the processor.

#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

constexpr int64_t CHUNK = 1 << 18;  // elements per thread that justify its start, about 15 µs

// Calls f(i) for i in 0 … count - 1, in any order, on at most `threads` threads.
template <typename F>
void parallel(int64_t count, int64_t threads, F f) {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        for (int64_t i; (i = next++) < count;) f(i);
    };
    std::vector<std::thread> others;
    for (int64_t t = 1; t < threads && t < count; t++) others.emplace_back(work);
    work();
    for (std::thread &other : others) other.join();
}
