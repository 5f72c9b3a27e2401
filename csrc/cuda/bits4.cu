#include "launch.cuh"

template void gptq::multiply_bits<4>(const Product&, Dtype, const Plan&, void*);
template void gptq::dequantize_bits<4>(const Weight&, int, int, int, void*, Dtype, void*);
