// Chooses a level and shares the work among threads.
#include "gemm.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

namespace gptq {
namespace {

std::vector<const Level*> available() {
    std::vector<const Level*> found = {&level_generic};
#ifdef __x86_64__
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx2) found.push_back(&level_avx2);
    if (avx2 && __builtin_cpu_supports("avxvnni")) found.push_back(&level_avx_vnni);
    if (avx512) found.push_back(&level_avx512);
    if (avx512 && __builtin_cpu_supports("avx512vnni")) found.push_back(&level_avx512_vnni);
#endif
    return found;
}

const Level* choose() {
    const auto found = available();
    const char* wanted = std::getenv("GPTQ_BACKEND_CPU_LEVEL");
    if (!wanted || !*wanted) return found.back();
    std::string names;
    for (const Level* level : found) {
        if (std::string(wanted) == level->name) return level;
        names += std::string(names.empty() ? "" : ", ") + level->name;
    }
    throw std::runtime_error(std::string("GPTQ_BACKEND_CPU_LEVEL=") + wanted + ": this CPU offers " + names);
}

// Scratch that a thread keeps from call to call.
template <class T>
class Scratch {
  public:
    T* reserve(size_t count) {
        if (count > size_) {
            data_.reset(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64))));
            size_ = count;
        }
        return data_.get();
    }

  private:
    struct Free {
        void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
    };
    std::unique_ptr<T, Free> data_;
    size_t size_ = 0;
};

// Activations of this many rows become integers before they are multiplied: a few MB, and the weights' traffic per row
// is negligible.
constexpr int kRowsAtATime = 480;
// Below this many multiplications waking a second thread costs more than it saves.
constexpr int64_t kSerialWork = 1 << 17;

void gemm_rows(const Call& c, const Level& level, int threads) {
    const Weight& w = c.weight;
    const bool few = c.rows * c.planes <= kMaxFused;
    const int row_step = few ? c.rows : kRowTask;
    const int row_tasks = (c.rows + row_step - 1) / row_step;
    // Strips of a task: enough tasks that no thread waits long for another's last one.
    int strip_step = few ? 8 : kStripTask;
    while (strip_step > 1 && int64_t(row_tasks) * (w.strips() / strip_step) < 8 * int64_t(threads)) strip_step /= 2;
    const int strip_tasks = (w.strips() + strip_step - 1) / strip_step;
    const int tasks = row_tasks * strip_tasks;
    const auto quantize = [&](int row) { level.quantize(c, row); };
    const auto multiply = [&](int task) {
        // Neighbouring tasks share the weights.
        const int m0 = task % row_tasks * row_step, s0 = task / row_tasks * strip_step;
        level.multiply(c, m0, std::min(m0 + row_step, c.rows), s0, std::min(s0 + strip_step, w.strips()));
    };
    const bool serial = threads == 1 || int64_t(c.rows) * w.slots * w.out_features < kSerialWork;
    // A few rows take microseconds, like the barrier that sharing them would need.
    if (serial || few) {
        for (int row = 0; row < c.rows; ++row) quantize(row);
    }
    if (serial) {
        for (int task = 0; task < tasks; ++task) multiply(task);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        if (!few) {
#pragma omp for schedule(static)
            for (int row = 0; row < c.rows; ++row) quantize(row);
        }
#pragma omp for schedule(dynamic) nowait
        for (int task = 0; task < tasks; ++task) multiply(task);
    }
}

}  // namespace

std::vector<std::string> levels() {
    std::vector<std::string> names;
    for (const Level* level : available()) names.push_back(level->name);
    return names;
}

const Level& level() {
    static const Level* chosen = choose();
    return *chosen;
}

void gemm(Call c, int threads) {
    thread_local Scratch<uint32_t> lanes;
    thread_local Scratch<float> scales;
    thread_local Scratch<int32_t> sums;
    const Level& isa = level();
    c.planes = c.dtype == Dtype::f32 && !c.a8 ? 2 : 1;
    const size_t rows = size_t(std::min(c.rows, kRowsAtATime)) * c.planes;
    c.lanes = lanes.reserve(rows * c.lane_stride());
    c.x_scales = scales.reserve(rows * c.weight.n_blocks);
    c.x_sums = sums.reserve(rows * c.weight.n_blocks);
    const int size = c.dtype == Dtype::f32 ? 4 : 2;
    const char* x = static_cast<const char*>(c.x);
    char* y = static_cast<char*>(c.y);
    for (int m = 0, all = c.rows; m < all; m += kRowsAtATime) {
        c.rows = std::min(kRowsAtATime, all - m);
        c.x = x + size_t(m) * c.weight.in_features * size;
        c.y = y + size_t(m) * c.weight.out_features * size;
        gemm_rows(c, isa, std::max(1, threads));
    }
}

double read_bandwidth(const void* data, size_t bytes, int passes, int threads) {
    typedef uint64_t Line __attribute__((vector_size(64)));
    const Line* lines = static_cast<const Line*>(data);
    const int64_t count = int64_t(bytes / sizeof(Line)), chunk = 512;
    uint64_t sum = 0;
    const double start = omp_get_wtime();
#pragma omp parallel num_threads(threads) reduction(+ : sum)
    for (int pass = 0; pass < passes; ++pass) {
#pragma omp for schedule(dynamic, 8)
        for (int64_t first = 0; first < count; first += chunk) {
            Line a{}, b{};
            const int64_t end = std::min(count, first + chunk);
            for (int64_t i = first; i + 2 <= end; i += 2) {
                __builtin_prefetch(lines + i + 32);
                __builtin_prefetch(lines + i + 33);
                a += lines[i];
                b += lines[i + 1];
            }
            sum += (a + b)[0];
        }
    }
    const double seconds = omp_get_wtime() - start;
    volatile uint64_t sink = sum;  // keeps the reads
    (void)sink;
    return double(count) * sizeof(Line) * passes / seconds;
}

}  // namespace gptq
