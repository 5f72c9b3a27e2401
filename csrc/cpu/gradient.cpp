// Shares the work of the gradient among threads.
#include "gradient.h"

#include <omp.h>

#include <algorithm>

#include "gemm.h"
#include "team.h"

namespace gptq {

void gradient(const GradientCall& c, int threads) {
    const Level& isa = level();
    const int row_tasks = (c.rows + kGradientRows - 1) / kGradientRows, tasks = row_tasks * c.weight.n_blocks;
    const auto multiply = [&](int task) {
        // Neighbouring tasks share rows, which take more bytes than the words of a block.
        const int m0 = task / c.weight.n_blocks * kGradientRows;
        isa.gradient(c, m0, std::min(m0 + kGradientRows, c.rows), task % c.weight.n_blocks);
    };
    const int64_t work = int64_t(c.rows) * c.weight.slots * c.weight.out_features;
    const int team = work < kSerialWork ? 1 : team_size(threads);
    if (team == 1) {
        for (int task = 0; task < tasks; ++task) multiply(task);
        return;
    }
    Watch watch(team);
#pragma omp parallel num_threads(team)
    {
        int done = 0;
#pragma omp for schedule(dynamic) nowait
        for (int task = 0; task < tasks; ++task) {
            multiply(task);
            ++done;
        }
        watch.end(done);
    }
}

}  // namespace gptq
