#include "launch.cuh"

namespace gptq {

extern template void multiply_bits<2>(const Product&, Dtype, const Plan&, void*);
extern template void multiply_bits<3>(const Product&, Dtype, const Plan&, void*);
extern template void multiply_bits<4>(const Product&, Dtype, const Plan&, void*);
extern template void multiply_bits<8>(const Product&, Dtype, const Plan&, void*);
extern template void dequantize_bits<2>(const Weight&, int, int, int, void*, Dtype, void*);
extern template void dequantize_bits<3>(const Weight&, int, int, int, void*, Dtype, void*);
extern template void dequantize_bits<4>(const Weight&, int, int, int, void*, Dtype, void*);
extern template void dequantize_bits<8>(const Weight&, int, int, int, void*, Dtype, void*);

namespace {

template <class Function>
void with_bits(int bits, Function function) {
    switch (bits) {
        case 2:
            return function(std::integral_constant<int, 2>());
        case 3:
            return function(std::integral_constant<int, 3>());
        case 4:
            return function(std::integral_constant<int, 4>());
        case 8:
            return function(std::integral_constant<int, 8>());
    }
    throw std::invalid_argument("bits is " + std::to_string(bits) + ", expected 2, 3, 4 or 8");
}

}  // namespace

std::string unfit(int device) {
    return unfit_kernel<gather_kernel<uint16_t>>(device);
}

void multiply(int device, const Product& product, Dtype dtype, const Plan& plan, void* stream) {
    use_device(device);
    with_bits(product.weight.bits, [&](auto bits) { multiply_bits<bits>(product, dtype, plan, stream); });
}

void dequantize(int device, const Weight& weight, int first, int channels, int columns, void* to, Dtype dtype,
                void* stream) {
    use_device(device);
    with_bits(weight.bits,
              [&](auto bits) { dequantize_bits<bits>(weight, first / kStrip, channels, columns, to, dtype, stream); });
}

void gather(int device, const void* x, int rows, int columns, int element_bytes, const int32_t* perm, int slots,
            void* to, void* stream) {
    use_device(device);
    constexpr int kThreads = 256, kMaxRows = 65535;
    auto go = [&](auto element) {
        using Element = decltype(element);
        for (int first = 0; first < rows; first += kMaxRows) {
            const dim3 grid(ceil_div(slots, kThreads), rows - first < kMaxRows ? rows - first : kMaxRows);
            launch<gather_kernel<Element>>(grid, kThreads, 0, stream,
                                           static_cast<const Element*>(x) + int64_t(first) * columns, perm,
                                           static_cast<Element*>(to) + int64_t(first) * slots, columns, slots);
        }
    };
    element_bytes == 2 ? go(uint16_t()) : go(uint32_t());
}

}  // namespace gptq
