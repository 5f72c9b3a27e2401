// From plans to launches.
#include "launch.h"

#include <stdexcept>

#include "modules.h"

namespace gptq {
namespace {

struct Grid {
    int x, y = 1, z = 1;
};

int ceil_div(int64_t a, int64_t b) {
    return static_cast<int>((a + b - 1) / b);
}

// args: what the kernel declares, type by type.
template <class... Args>
void launch(const Kernels& loaded, const Kernel& kernel, Grid grid, int threads, size_t shared_bytes, void* stream,
            const Args&... args) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
    const driver::Current current(loaded.context);
    const int status = driver::api().launch(kernel.function, grid.x, grid.y, grid.z, threads, 1, 1,
                                            static_cast<unsigned>(shared_bytes), static_cast<driver::Stream>(stream),
                                            pointers, nullptr);
    if (status) driver::check(status, "launching " + kernel.name);
}

void run_skinny(const Kernels& loaded, const Kernel& kernel, const Product& p, const Plan& plan, void* stream) {
    const Grid grid{ceil_div(p.weight.strips, plan.strips), ceil_div(p.rows, plan.tokens * 8)};
    const size_t shared = size_t(plan.warps) * plan.strips * plan.tokens * 512;
    launch(loaded, kernel, grid, plan.warps * 32, shared, stream, p);
}

void run_wide(const Kernels& loaded, const Kernel& kernel, const Product& p, int type, const Plan& plan, void* stream) {
    const Grid grid{ceil_div(p.weight.strips, kWideStrips), ceil_div(p.rows, plan.tokens * 8), plan.splits};
    // The pipeline's stages; afterwards, in less, the block's outputs.
    const int bits = p.weight.bits, stages = wide_stages(bits, plan.tokens, loaded.shared_bytes);
    const size_t pipeline = size_t(stages) * wide_stage_bytes(bits, plan.tokens);
    launch(loaded, kernel, grid, kWideWarps * 32, pipeline, stream, p);
    if (plan.splits > 1) {
        const int64_t outputs = int64_t(p.rows) * p.weight.out_features;
        launch(loaded, loaded.reduce[type], {ceil_div(outputs, 256)}, 256, 0, stream, p, plan.splits);
    }
}

}  // namespace

void multiply(int device, const Product& p, Dtype dtype, const Plan& plan, void* stream) {
    const Kernels& loaded = kernels(device, p.weight.bits);
    const int type = dtype == kBFloat16 ? 0 : 1;
    switch (plan.strips * 10 + plan.tokens) {
        case 11:
        case 12:
        case 21:
        case 22:
            return run_skinny(loaded, loaded.skinny[type][plan.strips - 1][plan.tokens - 1], p, plan, stream);
        case 2:
            return run_wide(loaded, loaded.wide[type][0], p, type, plan, stream);
        case 4:
            return run_wide(loaded, loaded.wide[type][1], p, type, plan, stream);
        case 8:
            return run_wide(loaded, loaded.wide[type][2], p, type, plan, stream);
    }
    throw std::invalid_argument("no kernel with " + std::to_string(plan.strips) + " strips and " +
                                std::to_string(plan.tokens) + " blocks of tokens");
}

void dequantize(int device, const Weight& w, int first, int channels, int columns, void* to, Dtype dtype,
                void* stream) {
    constexpr int kWarps = 4;
    const Kernels& loaded = kernels(device, w.bits);
    const Grid grid{ceil_div(w.tiles, kWarps), ceil_div(channels, kStrip)};
    const int first_strip = first / kStrip;
    launch(loaded, loaded.dequantize[dtype], grid, kWarps * 32, 0, stream, w, first_strip, channels, columns, to);
}

void gather(int device, int bits, const void* x, int rows, int columns, int element_bytes, const int32_t* perm,
            int slots, void* to, void* stream) {
    constexpr int kThreads = 256, kMaxRows = 65535;
    const Kernels& loaded = kernels(device, bits);
    for (int first = 0; first < rows; first += kMaxRows) {
        const void* const from = static_cast<const char*>(x) + int64_t(first) * columns * element_bytes;
        void* const target = static_cast<char*>(to) + int64_t(first) * slots * element_bytes;
        const Grid grid{ceil_div(slots, kThreads), std::min(rows - first, kMaxRows)};
        launch(loaded, loaded.gather[element_bytes == 2 ? 0 : 1], grid, kThreads, 0, stream, from, perm, target,
               columns, slots);
    }
}

}  // namespace gptq
