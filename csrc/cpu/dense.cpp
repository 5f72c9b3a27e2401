// Shares the outputs of a product among threads.
#include "dense.h"

#include <algorithm>

#include "gemm.h"
#include "row_sharing.h"
#include "scratch.h"

namespace gptq {

void multiply(const Dense& dense, const Rows& shape, const void* x, Dtype to, void* y, int threads) {
    constexpr int kOutputs = 8;  // of a task
    const RowKernels& kernels = *level().rows;
    const int n = dense.outputs, padded = (shape.width + kDotAlignment - 1) / kDotAlignment * kDotAlignment;
    thread_local Scratch<float> kept;
    float* const wide = kept.reserve(size_t(shape.rows) * padded);
    for (int row = 0; row < shape.rows; ++row) {
        float* const to_row = wide + size_t(row) * padded;
        kernels.widen(shape.dtype, row_of(x, shape, row), to_row, shape.width);
        std::fill(to_row + shape.width, to_row + padded, 0.0f);
    }
    const int64_t work = int64_t(shape.rows) * shape.width * n;
    share_elements((n + kOutputs - 1) / kOutputs, work, threads, [&](int task) {
        const int first = task * kOutputs, count = std::min(kOutputs, n - first);
        for (int row = 0; row < shape.rows; row += kDotRows) {
            kernels.dots(dense, first, count, wide + size_t(row) * padded, padded, std::min(kDotRows, shape.rows - row),
                         to, row_of(y, {to, shape.rows, n}, row));
        }
    });
}

}  // namespace gptq
