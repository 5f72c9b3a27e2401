// Chooses a level and shares the work among threads.
#include "gemm.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "crew.h"
#include "platform.h"
#include "scratch.h"

namespace gptq {
namespace {

// GPTQ_LEVELS is LEVEL(name) of each level that the compiler could build, slowest first; setup.py asks it.
std::vector<const Level*> available() {
    std::vector<const Level*> found = {&level_generic};
    [[maybe_unused]] const Features cpu = cpu_features();
#define LEVEL(name) \
    if (cpu.name) found.push_back(&level_##name);
    GPTQ_LEVELS
#undef LEVEL
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

// Rows of a task, whose activations should stay in a core's cache while strips pass by.
constexpr int kRowTask = 24;
constexpr int kFewRows = 4;

// How a call is cut into tasks, and the numbers of its first task and first row among those of all calls.
struct Cut {
    int row_step, row_tasks, strip_step, first_task, first_row;
};

// The one whose numbers `task` (a row) is among.
int find(const std::vector<Cut>& cuts, int Cut::* first, int number) {
    const auto after = std::upper_bound(cuts.begin(), cuts.end(), number,
                                        [&](int value, const Cut& cut) { return value < cut.*first; });
    return int(after - cuts.begin()) - 1;
}

// Multiplies all calls, as if they were one. Calls with the `lanes` of the one before share its activations.
void multiply_all(const std::vector<Call>& calls, int threads) {
    const Level& isa = level();
    std::vector<Cut> cuts;
    int rows = 0, tasks = 0;
    int64_t work = 0;
    bool few = true;
    for (size_t i = 0; i < calls.size(); ++i) {
        const Call& c = calls[i];
        const int strips = c.weight.strips();
        const int row_step = std::min(c.rows, kRowTask), row_tasks = (c.rows + row_step - 1) / row_step;
        // Strips of a task: enough tasks that no thread waits long for another's last one.
        int step = 8;
        while (step > 1 && int64_t(calls.size()) * row_tasks * (strips / step) < 8 * int64_t(threads)) step /= 2;
        cuts.push_back({row_step, row_tasks, step, tasks, rows});
        tasks += row_tasks * ((strips + step - 1) / step);
        if (!i || c.lanes != calls[i - 1].lanes) rows += c.rows;
        work += int64_t(c.rows) * c.weight.slots * c.weight.out_features;
        few = few && rows * c.planes <= kFewRows;
    }
    const auto quantize = [&](int row) {
        const int i = find(cuts, &Cut::first_row, row);
        isa.quantize(calls[i], row - cuts[i].first_row);
    };
    const auto multiply = [&](int task) {
        const int i = find(cuts, &Cut::first_task, task);
        const Call& c = calls[i];
        const Cut& cut = cuts[i];
        task -= cut.first_task;
        // Neighbouring tasks share the weights.
        const int m0 = task % cut.row_tasks * cut.row_step, s0 = task / cut.row_tasks * cut.strip_step;
        isa.multiply(c, m0, std::min(m0 + cut.row_step, c.rows), s0, std::min(s0 + cut.strip_step, c.weight.strips()));
    };
    // A thread makes integers of a few rows sooner than threads find together.
    for (int row = 0; few && row < rows; ++row) quantize(row);
    const bool worth = work >= (Crew::current() ? kSharedWork : kSerialWork);
    const auto all = [&] {
        if (!few) share(rows, worth, quantize);
        share(tasks, worth, multiply);
    };
    Crew::with(threads, worth, all);
}

bool same(const int32_t* a, const int32_t* b, size_t count) {
    return a == b || (a && b && !std::memcmp(a, b, count * sizeof(int32_t)));
}

// Whether one weight meets the integers that were made for the other.
bool share_activations(const Call& a, const Call& b) {
    const Weight &v = a.weight, &w = b.weight;
    return a.x == b.x && a.x_rows == b.x_rows && a.rows == b.rows && a.dtype == b.dtype && a.a8 == b.a8 &&
           (!a.a8 || v.bits == w.bits) && v.in_features == w.in_features && v.slots == w.slots &&
           v.n_blocks == w.n_blocks && same(v.blocks, w.blocks, size_t(v.n_blocks) * 3) &&
           same(v.perm, w.perm, v.slots);
}

// Gives the calls room for their activations, and runs them.
void run(std::vector<Call>& calls, int threads) {
    thread_local Scratch<uint32_t> lanes;
    thread_local Scratch<float> scales;
    thread_local Scratch<int32_t> sums;
    struct Place {
        size_t lanes, blocks;
    } next = {0, 0}, place = next;
    std::vector<Place> places;
    for (size_t i = 0; i < calls.size(); ++i) {
        const Call& c = calls[i];
        if (!i || !share_activations(calls[i - 1], c)) {
            const size_t rows = size_t(c.rows) * c.planes;
            place = next;
            next = {next.lanes + rows * c.lane_stride(), next.blocks + rows * c.weight.n_blocks};
        }
        places.push_back(place);
    }
    uint32_t* const all_lanes = lanes.reserve(next.lanes);
    float* const all_scales = scales.reserve(next.blocks);
    int32_t* const all_sums = sums.reserve(next.blocks);
    for (size_t i = 0; i < calls.size(); ++i) {
        calls[i].lanes = all_lanes + places[i].lanes;
        calls[i].x_scales = all_scales + places[i].blocks;
        calls[i].x_sums = all_sums + places[i].blocks;
    }
    multiply_all(calls, threads);
}

int planes(const Call& c) {
    return c.dtype == Dtype::f32 && !c.a8 ? 2 : 1;
}

const void* after(const void* p, size_t bytes) {
    return p ? static_cast<const char*>(p) + bytes : nullptr;
}

// Number i of a stack of weights.
Weight weight_at(Weight w, size_t i) {
    const size_t scales = size_t(w.strips()) * w.groups * kStrip;
    w.words += i * w.strips() * (size_t(w.slots) * w.bits / 32) * kStrip;
    w.scales = after(w.scales, i * scales * size_of(w.scales_dtype));
    if (w.zeros) w.zeros += i * scales;
    if (w.perm) w.perm += i * w.slots;
    w.blocks += i * w.n_blocks * 3;
    return w;
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

void gemm(const std::vector<Call>& calls, int threads) {
    const int all = calls[0].rows;
    for (int m = 0; m < all; m += kRowsAtATime) {
        std::vector<Call> some = calls;
        for (Call& c : some) {
            const int size = size_of(c.dtype);
            c.planes = planes(c);
            c.rows = std::min(kRowsAtATime, all - m);
            c.x = after(c.x, size_t(m) * c.weight.in_features * size);
            c.y = static_cast<char*>(c.y) + size_t(m) * c.weight.out_features * size;
        }
        run(some, threads);
    }
}

void moe_gemm(Call c, const Experts& e, int threads) {
    c.planes = planes(c);
    const int rows = c.rows;
    const auto id = [&](int row) {
        const int64_t value = e.id_size == 8 ? reinterpret_cast<const int64_t*>(e.ids)[row]
                                             : reinterpret_cast<const int32_t*>(e.ids)[row];
        return value < 0 || value >= e.count ? e.count : int(value);
    };
    // A counting sort. Those of no expert come last.
    std::vector<int> ends(e.count + 1);
    for (int row = 0; row < rows; ++row) ++ends[id(row)];
    for (int i = 1; i <= e.count; ++i) ends[i] += ends[i - 1];
    std::vector<int32_t> x_rows(rows), y_rows(size_t(rows) * e.parts);
    for (int row = rows; row-- > 0;) {
        const int at = --ends[id(row)];  // from here on where the expert's rows begin
        x_rows[at] = row / e.top_k;
        for (int part = 0; part < e.parts; ++part) y_rows[size_t(part) * rows + at] = row * e.parts + part;
    }
    const size_t y_bytes = size_t(c.weight.out_features) * size_of(c.dtype);
    for (int i = ends[e.count]; i < rows; ++i) {
        std::memset(static_cast<char*>(c.y) + y_rows[i] * y_bytes, 0, y_bytes * e.parts);
    }
    std::vector<Call> calls;
    int pending = 0;
    for (int i = 0; i < e.count; ++i) {
        for (int m = ends[i]; m < ends[i + 1]; m += kRowsAtATime) {
            const int count = std::min(kRowsAtATime, ends[i + 1] - m);
            if (pending && pending + count > kRowsAtATime) {
                run(calls, threads);
                calls.clear();
                pending = 0;
            }
            pending += count;
            for (int part = 0; part < e.parts; ++part) {
                const size_t number = size_t(part) * e.count + i;
                Call one = c;
                one.weight = weight_at(c.weight, number);
                one.bias = after(c.bias, number * c.weight.out_features * size_of(c.bias_dtype));
                one.x_rows = &x_rows[m];
                one.y_rows = &y_rows[size_t(part) * rows + m];
                one.rows = count;
                calls.push_back(one);
            }
        }
    }
    if (!calls.empty()) run(calls, threads);
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
