#include "team.h"

#include <algorithm>
#include <atomic>
#include <climits>
#include <mutex>

namespace gptq {
namespace {

constexpr double kLong = 2e-4;              // seconds; a barrier takes 1e-6, a time slice of the system 1e-3 to 1e-2
constexpr double kWindow = 0.02;            // seconds of regions that are looked back on: one stall among them is none
constexpr double kFirst = 0.01, kMost = 1;  // seconds until more threads are tried

std::atomic<int> limit{INT_MAX};  // of threads

// Whoever finds the rest in use leaves it alone, and goes on.
std::mutex in_use;
double lost_lately = 0, spent_lately = 0;  // seconds in regions, the older ones counting less
int former = 1;                            // the limit before it was last raised
double raised_at = 0, raise_at = 0, pause = kFirst;

// Doubles far from what the caller may use, and halves the distance near it.
int raised(int from, int threads) {
    return std::min(2 * from, from + (threads - from + 1) / 2);
}

}  // namespace

int team_size(int threads) {
    const int most = limit.load(std::memory_order_relaxed);
    if (most >= threads) return threads;
    const double now = omp_get_wtime();
    const std::unique_lock<std::mutex> lock(in_use, std::try_to_lock);
    if (!lock || now < raise_at) return most;
    former = most;
    raised_at = now;
    raise_at = now + pause;
    limit.store(raised(most, threads), std::memory_order_relaxed);
    return raised(most, threads);
}

Watch::~Watch() {
    const double now = omp_get_wtime(), total = now - start_;
    const double put_aside = std::max(0.0, since_ - start_ - waited_ - busy_);
    const double waited = waited_ + (now - since_);
    // For one or two tasks threads wait for each other anyway.
    const bool uneven = !done_ || waited < 2 * (total - waited) / done_;
    const double lost = put_aside + (uneven ? 0 : waited);
    const std::unique_lock<std::mutex> lock(in_use, std::try_to_lock);
    if (!lock) return;
    lost_lately += lost < kLong ? 0 : lost;
    spent_lately += total;
    // Half as many threads need twice the time that was not lost, so they pay only if more than half was.
    const bool crowded = lost_lately > 0.5 * spent_lately;
    if (!crowded && spent_lately > kWindow) lost_lately /= 2, spent_lately /= 2;
    // Of several regions at a time the first that waited is heard.
    if (!crowded || team_ > limit.load(std::memory_order_relaxed)) return;
    lost_lately = spent_lately = 0;
    const bool in_vain = now < raised_at + pause;
    pause = in_vain ? std::min(2 * pause, kMost) : kFirst;
    raise_at = now + pause;
    raised_at = 0;
    limit.store(in_vain ? former : std::max(1, team_ / 2), std::memory_order_relaxed);
}

}  // namespace gptq
