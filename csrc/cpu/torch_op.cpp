#include "torch_op.h"

#include <optional>

#include "gemm.h"
#include "layer_halves.h"
#include "torch_abi.h"

namespace gptq {
namespace {

void give(Value* stack, int i, OwnedTensor tensor) {
    stack[i] = reinterpret_cast<Value>(tensor.release());
}

// -- cpu_gemm_inference

enum { kX, kWords, kScales, kZeros, kPerm, kBlocks, kInFeatures, kOutFeatures, kBits, kA8, kBias };

// Null for what needs a conversion, or is wrong.
OwnedTensor multiply(const Arguments& in) {
    const TensorView x(in[kX]), words(in[kWords]), scales(in[kScales]), zeros(in.optional(kZeros)),
        perm(in.optional(kPerm)), blocks(in[kBlocks]), bias(in.optional(kBias));
    Call call{};
    Weight& w = call.weight;
    w.in_features = int(in[kInFeatures]);
    w.out_features = int(in[kOutFeatures]);
    w.bits = int(in[kBits]);
    call.a8 = in[kA8] & 1;
    bool simple = words.dim == 3;  // a state dict's words have 2
    simple &= x.fits(w.in_features) && x.contiguous() && x.find_dtype(&call.dtype);
    simple &= scales.find_dtype(&w.scales_dtype);
    if (bias.handle) {
        simple &= bias.fits(w.out_features) && bias.dim == 1 && bias.contiguous() && bias.find_dtype(&call.bias_dtype);
    }
    if (!simple) return nullptr;
    w.words = static_cast<uint32_t*>(words.data);
    w.scales = scales.data;
    w.zeros = static_cast<uint8_t*>(zeros.data);
    w.perm = static_cast<int32_t*>(perm.data);
    w.blocks = static_cast<int32_t*>(blocks.data);
    w.slots = int(words.sizes[1] * 32 / w.bits);
    w.groups = int(scales.sizes[1]);
    w.n_blocks = int(blocks.sizes[0]);
    call.rows = x.rows();
    OwnedTensor y = empty_tensor(x.with_last(w.out_features), x.torch_dtype);
    call.x = x.data;
    call.bias = bias.data;
    call.y = data_of(y);
    gemm({call}, torch_threads());
    return y;
}

void gemm_kernel(Value* stack, uint64_t, uint64_t) {
    OwnedTensor y;
    {
        Arguments arguments(stack, {kX, kWords, kScales, kBlocks}, {kZeros, kPerm, kBias});
        y = multiply(arguments);
        if (!y) return arguments.hand_on("cpu_gemm");
    }
    give(stack, 0, std::move(y));
}

// -- cpu_start_layer_inference and cpu_end_layer_inference

struct Results {
    OwnedTensor first, second;
};

// A contiguous [..., width] of a dtype of the kernels.
bool simple(const TensorView& x, int width, Dtype* dtype) {
    return x.fits(width) && x.contiguous() && x.find_dtype(dtype);
}

bool alike(const TensorView& a, const TensorView& b) {
    return a.rows() == b.rows() && a.torch_dtype == b.torch_dtype;
}

// Null if the tensor is no key.
const int64_t* key_of(const TensorView& key) {
    const bool one = key.fits(1) && key.dim == 1 && key.torch_dtype == torch.aoti_torch_dtype_int64();
    return one ? static_cast<const int64_t*>(key.data) : nullptr;
}

// For x, residual or none, and the key and outputs of a layer's start; nothing for what needs a conversion, or is
// wrong.
std::optional<Results> start(const Arguments& in) {
    const TensorView x(in[0]), residual(in.optional(1)), key(in[2]);
    const int64_t* const number = key_of(key);
    const LayerStart* const layer = number ? find_start(*number) : nullptr;
    Dtype dtype, other;
    if (!layer || int64_t(in[3]) != layer->outputs() || !simple(x, layer->width(), &dtype)) return {};
    if (residual.handle && !(simple(residual, layer->width(), &other) && alike(x, residual))) return {};
    Results found = {empty_tensor(x.with_last(layer->outputs()), x.torch_dtype),
                     empty_tensor(x.with_last(layer->width()), x.torch_dtype)};
    start_layer(*layer, {dtype, x.rows(), layer->width()}, x.data, residual.data, data_of(found.first),
                data_of(found.second), torch_threads());
    return found;
}

// Likewise for x, residual and the key of a layer's end.
std::optional<Results> end(const Arguments& in) {
    const TensorView x(in[0]), residual(in[1]), key(in[2]);
    const int64_t* const number = key_of(key);
    const Tail* const layer = number ? find_end(*number) : nullptr;
    if (!layer) return {};
    const Weight& o = layer->output.o->weight;
    Dtype dtype, other;
    if (!simple(x, o.in_features, &dtype) || !simple(residual, o.out_features, &other) || !alike(x, residual)) {
        return {};
    }
    const std::vector<int64_t> sizes = residual.with_last(o.out_features);
    Results found = {empty_tensor(sizes, x.torch_dtype), empty_tensor(sizes, x.torch_dtype)};
    end_layer(*layer, {dtype, x.rows(), o.out_features}, x.data, residual.data, data_of(found.first),
              data_of(found.second), torch_threads());
    return found;
}

void start_kernel(Value* stack, uint64_t, uint64_t) {
    std::optional<Results> found;
    {
        Arguments arguments(stack, {0, 2}, {1});
        found = start(arguments);
        if (!found) return arguments.hand_on("cpu_start_layer");
    }
    give(stack, 0, std::move(found->first));
    give(stack, 1, std::move(found->second));
}

void end_kernel(Value* stack, uint64_t, uint64_t) {
    std::optional<Results> found;
    {
        Arguments arguments(stack, {0, 1, 2}, {});
        found = end(arguments);
        if (!found) return arguments.hand_on("cpu_end_layer");
    }
    give(stack, 0, std::move(found->first));
    give(stack, 1, std::move(found->second));
}

}  // namespace

void register_with_torch(const std::string& name, const std::map<std::string, uintptr_t>& functions) {
    static const std::map<std::string, Kernel> kernels = {
        {"cpu_gemm_inference", gemm_kernel},
        {"cpu_start_layer_inference", start_kernel},
        {"cpu_end_layer_inference", end_kernel},
    };
    register_kernel(name.c_str(), kernels.at(name), functions);
}

}  // namespace gptq
