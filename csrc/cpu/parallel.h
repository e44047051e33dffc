// Rows shared among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace lrq::cpu {

// Rows taken at a time: the search costs more in some blocks than in others, so shares are not fixed.
constexpr int64_t kGrain = 16;

inline int worker_count(int64_t rows, int threads, int64_t grain = kGrain) {
    return static_cast<int>(std::clamp<int64_t>((rows + grain - 1) / grain, 1, std::max(threads, 1)));
}

// Calls `work(worker, row)` once for every row; it must not throw.
template <class Work>
void parallel_rows(int64_t rows, int workers, const Work& work, int64_t grain = kGrain) {
    std::atomic<int64_t> next{0};
    const auto run = [&](int worker) {
        for (int64_t first = next.fetch_add(grain); first < rows; first = next.fetch_add(grain))
            for (int64_t row = first; row < std::min(first + grain, rows); ++row) work(worker, row);
    };
    std::vector<std::thread> threads;
    threads.reserve(workers - 1);
    try {
        for (int worker = 1; worker < workers; ++worker) threads.emplace_back(run, worker);
    } catch (const std::exception&) {
        // The system gives no more threads: those that run, and this one, take all rows.
    }
    run(0);
    for (std::thread& thread : threads) thread.join();
}

}  // namespace lrq::cpu
