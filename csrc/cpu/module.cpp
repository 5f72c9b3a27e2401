// Python bindings. Tensors arrive as addresses and sizes, so that one build serves every version of torch; the callers
// in gptq_backend/kernels/cpu.py own the checks.
#include "../python/binding.h"
#include "block_module.h"
#include "gemm.h"
#include "gradient.h"
#include "lookup.h"
#include "places_module.h"
#include "platform.h"
#include "torch_op.h"

using gptq::Dtype;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

gptq::Weight weight_at(uintptr_t words, uintptr_t scales, int scales_dtype, uintptr_t zeros, uintptr_t perm,
                       uintptr_t blocks, int bits, int in_features, int out_features, int slots, int groups,
                       int n_blocks) {
    return {at<uint32_t>(words),
            at<void>(scales),
            at<uint8_t>(zeros),
            at<int32_t>(perm),
            at<int32_t>(blocks),
            Dtype(scales_dtype),
            bits,
            in_features,
            out_features,
            slots,
            groups,
            n_blocks};
}

// Experts: none, or the members of gptq::Experts.
template <class... Experts>
void gemm(uintptr_t x, int dtype, int rows, uintptr_t words, uintptr_t scales, int scales_dtype, uintptr_t zeros,
          uintptr_t perm, uintptr_t blocks, int bits, int in_features, int out_features, int slots, int groups,
          int n_blocks, uintptr_t bias, int bias_dtype, uintptr_t y, bool a8, int threads, Experts... experts) {
    gptq::Call call{};
    call.weight = weight_at(words, scales, scales_dtype, zeros, perm, blocks, bits, in_features, out_features, slots,
                            groups, n_blocks);
    call.x = at<void>(x);
    call.dtype = Dtype(dtype);
    call.rows = rows;
    call.bias = at<void>(bias);
    call.bias_dtype = Dtype(bias_dtype);
    call.y = at<void>(y);
    call.a8 = a8;
    if constexpr (sizeof...(Experts) == 0) {
        gptq::gemm({call}, threads);
    } else {
        gptq::moe_gemm(call, gptq::Experts{experts...}, threads);
    }
}

void gradient(uintptr_t y_grad, int dtype, int rows, uintptr_t words, uintptr_t scales, int scales_dtype,
              uintptr_t zeros, uintptr_t perm, uintptr_t blocks, int bits, int in_features, int out_features, int slots,
              int groups, int n_blocks, uintptr_t x_grad, int threads) {
    const gptq::Weight weight = weight_at(words, scales, scales_dtype, zeros, perm, blocks, bits, in_features,
                                          out_features, slots, groups, n_blocks);
    gptq::gradient({weight, at<void>(y_grad), at<void>(x_grad), Dtype(dtype), rows}, threads);
}

void look_up(uintptr_t ids, int rows, uintptr_t words, uintptr_t scales, int scales_dtype, uintptr_t zeros,
             uintptr_t perm, uintptr_t blocks, int bits, int in_features, int out_features, int slots, int groups,
             int n_blocks, uintptr_t y, int dtype, int threads) {
    const gptq::Weight weight = weight_at(words, scales, scales_dtype, zeros, perm, blocks, bits, in_features,
                                          out_features, slots, groups, n_blocks);
    gptq::look_up({weight, at<int64_t>(ids), rows, at<void>(y), Dtype(dtype)}, threads);
}

template <void (*Function)(const gptq::Repack&, int)>
void repack(uintptr_t source, int source_rows, int word_bits, int field_bits, uintptr_t words, uintptr_t perm, int bits,
            int out_features, int slots, int threads) {
    gptq::Weight weight{};
    weight.perm = at<int32_t>(perm);
    weight.bits = bits;
    weight.out_features = out_features;
    weight.slots = slots;
    Function({&weight, at<void>(source), at<uint32_t>(words), source_rows, word_bits, field_bits}, threads);
}

const char* level_name() {
    return gptq::level().name;
}

void advise(uintptr_t data, size_t bytes) {
    gptq::advise_huge_pages(at<void>(data), bytes);
}

double read_bandwidth(uintptr_t data, size_t bytes, int passes, int threads) {
    return gptq::read_bandwidth(at<void>(data), bytes, passes, threads);
}

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "gptq_backend._cpu",
                          "CPU kernels of gptq_backend; see csrc/cpu and docs/kernels.md.", -1, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() {
    using namespace gptq::python;
    static const std::vector<PyMethodDef> functions = {
        function<&gptq::levels>("levels"),
        function<&level_name>("level"),
        function<&gemm<>>("gemm"),
        function<&gemm<uintptr_t, int, int, int, int>>("moe_gemm"),
        function<&gradient>("gradient"),
        function<&look_up>("look_up"),
        function<&repack<gptq::pack>>("pack"),
        function<&repack<gptq::unpack>>("unpack"),
        function<&advise>("advise_huge_pages"),
        function<&gptq::torch_functions>("torch_functions"),
        function<&gptq::register_with_torch>("register_with_torch"),
        function<&read_bandwidth>("read_bandwidth"),
    };
    return make_module(&definition, [&](PyObject* module) {
        add_functions(module, functions);
        gptq::bind_blocks(module);
        gptq::bind_places(module);
    });
}
