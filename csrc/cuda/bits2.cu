#include "launch.cuh"

template void gptq::multiply_bits<2>(const Product&, Dtype, const Plan&, void*);
template void gptq::dequantize_bits<2>(const Weight&, int, int, int, void*, Dtype, void*);
