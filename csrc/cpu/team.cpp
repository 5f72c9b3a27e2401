#include "team.h"

#include <algorithm>
#include <atomic>

namespace gptq {
namespace {

constexpr double kLong = 2e-4;              // seconds; a barrier takes 1e-6, a time slice of the system 1e-3 to 1e-2
constexpr double kFirst = 0.02, kMost = 1;  // seconds until more threads are tried again

std::atomic<int> limit{0};  // of threads; 0: none
std::atomic<double> retry_at{0}, pause{kFirst};

}  // namespace

int team_size(int threads) {
    const int most = limit.load(std::memory_order_relaxed);
    if (!most || most >= threads) return threads;
    if (omp_get_wtime() < retry_at.load(std::memory_order_relaxed)) return most;
    limit.store(2 * most >= threads ? 0 : 2 * most, std::memory_order_relaxed);
    return std::min(2 * most, threads);
}

Watch::~Watch() {
    const double now = omp_get_wtime();
    waited_ += now - since_;
    if (waited_ < kLong || waited_ < 0.5 * (now - start_)) return;
    // In vain soon after the last time: later then.
    const double last = retry_at.load(std::memory_order_relaxed), before = pause.load(std::memory_order_relaxed);
    const double next = now < last + before ? std::min(2 * before, kMost) : kFirst;
    pause.store(next, std::memory_order_relaxed);
    retry_at.store(now + next, std::memory_order_relaxed);
    limit.store(std::max(1, team_ / 2), std::memory_order_relaxed);
}

}  // namespace gptq
