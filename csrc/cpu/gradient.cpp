// Shares the work of the gradient among threads.
#include "gradient.h"

#include <algorithm>

#include "crew.h"
#include "gemm.h"
#include "scratch.h"

namespace gptq {
namespace {

// So many tasks that no thread waits long for another's last one, but not of fewer rows: each unpacks its codes anew.
constexpr int kTasksPerThread = 4, kFewestRows = 24;

}  // namespace

void gradient(const GradientCall& c, int threads) {
    const Level& isa = level();
    const int blocks = c.weight.n_blocks;
    int step = kGradientRows, row_tasks = (c.rows + step - 1) / step;
    while (step > kFewestRows && row_tasks * blocks < kTasksPerThread * threads) {
        step /= 2;
        row_tasks = (c.rows + step - 1) / step;
    }
    const int tasks = row_tasks * blocks;
    const auto multiply = [&](int task) {
        thread_local Scratch<GradientPanel> panel;  // too large for the stack of some systems' threads
        // Neighbouring tasks share rows, which take more bytes than the words of a block.
        const int m0 = task / blocks * step;
        isa.gradient(c, m0, std::min(m0 + step, c.rows), task % blocks, *panel.reserve(1));
    };
    const int64_t work = int64_t(c.rows) * c.weight.slots * c.weight.out_features;
    Crew::with(threads, work >= kSerialWork, [&] { share(tasks, true, multiply); });
}

}  // namespace gptq
