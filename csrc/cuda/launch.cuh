// From plans to launches. Each width has a file that instantiates this, so that they compile side by side.
#pragma once
#include <stdexcept>
#include <string>

#include "kernels.cuh"

namespace gptq {

inline int ceil_div(int64_t a, int64_t b) {
    return static_cast<int>((a + b - 1) / b);
}

template <int Bits, class T, int Strips, int Tokens>
void run_skinny(const Product& p, const Plan& plan, void* stream) {
    const dim3 grid(ceil_div(p.weight.strips, Strips), ceil_div(p.rows, Tokens * 8));
    const size_t shared = size_t(plan.warps) * Strips * Tokens * 512;
    launch<skinny_kernel<Bits, T, Strips, Tokens>>(grid, plan.warps * 32, shared, stream, p);
}

template <int Bits, class T, int Tokens>
void run_wide(const Product& p, const Plan& plan, void* stream) {
    const dim3 grid(ceil_div(p.weight.strips, kWideStrips), ceil_div(p.rows, Tokens * 8), plan.splits);
    // The pipeline's stages, and afterwards the sums of half of the warps.
    constexpr size_t kExchange = size_t{4} * 32 * 2 * Tokens * 4 * 4;
    constexpr size_t kPipeline = size_t{kStages} * kStageBytes<Bits, Tokens>;
    launch<wide_kernel<Bits, T, Tokens>>(grid, kWideWarps * 32, kPipeline > kExchange ? kPipeline : kExchange, stream,
                                         p);
    if (plan.splits > 1) {
        const int64_t outputs = int64_t(p.rows) * p.weight.out_features;
        launch<reduce_kernel<T>>(dim3(ceil_div(outputs, 256)), 256, 0, stream, p, plan.splits);
    }
}

template <int Bits, class T>
void run(const Product& p, const Plan& plan, void* stream) {
    const int shape = plan.strips * 10 + plan.tokens;
    switch (shape) {
        case 11:
            return run_skinny<Bits, T, 1, 1>(p, plan, stream);
        case 21:
            return run_skinny<Bits, T, 2, 1>(p, plan, stream);
        case 22:
            return run_skinny<Bits, T, 2, 2>(p, plan, stream);
        case 2:
            return run_wide<Bits, T, 2>(p, plan, stream);
        case 4:
            return run_wide<Bits, T, 4>(p, plan, stream);
        case 8:
            return run_wide<Bits, T, 8>(p, plan, stream);
    }
    throw std::invalid_argument("no kernel with " + std::to_string(plan.strips) + " strips and " +
                                std::to_string(plan.tokens) + " blocks of tokens");
}

template <int Bits>
void multiply_bits(const Product& p, Dtype dtype, const Plan& plan, void* stream) {
    dtype == kBFloat16 ? run<Bits, BF16>(p, plan, stream) : run<Bits, F16>(p, plan, stream);
}

template <int Bits>
void dequantize_bits(const Weight& w, int first_strip, int channels, int columns, void* to, Dtype out_dtype,
                     void* stream) {
    constexpr int kWarps = 4;
    const dim3 grid(ceil_div(w.tiles, kWarps), ceil_div(channels, kStrip));
    auto go = [&](auto out) {
        launch<dequantize_kernel<Bits, decltype(out)>>(grid, kWarps * 32, 0, stream, w, first_strip, channels, columns,
                                                       to);
    };
    out_dtype == kFloat32 ? go(float()) : out_dtype == kBFloat16 ? go(BF16()) : go(F16());
}

}  // namespace gptq
