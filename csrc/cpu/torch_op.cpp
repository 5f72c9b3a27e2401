// libtorch's stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h and torch/csrc/stable/c/shim.h of torch 2.10)
// arrives as addresses at run time: no torch header, and one build for every version of torch that has it.
#include "torch_op.h"

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "gemm.h"

namespace gptq {
namespace {

struct TensorObject;
using Handle = TensorObject*;
using Value = uint64_t;  // an argument or a result: a Handle, an integer, or the address of an optional's Value
using Kernel = void (*)(Value*, uint64_t, uint64_t);

struct Functions {
    int32_t (*aoti_torch_library_init_impl)(const char* space, const char* key, const char* file, uint32_t line,
                                            void** library);
    int32_t (*aoti_torch_library_impl)(void* library, const char* name, Kernel);
    int32_t (*aoti_torch_call_dispatcher)(const char* name, const char* overload, Value* stack);
    int32_t (*aoti_torch_get_data_ptr)(Handle, void**);
    int32_t (*aoti_torch_get_dim)(Handle, int64_t*);
    int32_t (*aoti_torch_get_sizes)(Handle, int64_t**);
    int32_t (*aoti_torch_get_strides)(Handle, int64_t**);
    int32_t (*aoti_torch_get_dtype)(Handle, int32_t*);
    int32_t (*aoti_torch_get_device_type)(Handle, int32_t*);
    int32_t (*aoti_torch_empty_strided)(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t device_index, Handle*);
    int32_t (*aoti_torch_delete_tensor_object)(Handle);
    int32_t (*aoti_torch_dtype_float32)();
    int32_t (*aoti_torch_dtype_bfloat16)();
    int32_t (*aoti_torch_dtype_float16)();
    int32_t (*aoti_torch_device_type_cpu)();
    int32_t (*torch_get_num_threads)(uint32_t*);
} torch;

// Calls visit(name, address of the pointer) for each function.
template <class Visit>
void each_function(Visit visit) {
#define GPTQ_FUNCTION(name) visit(#name, reinterpret_cast<void**>(&torch.name))
    GPTQ_FUNCTION(aoti_torch_library_init_impl);
    GPTQ_FUNCTION(aoti_torch_library_impl);
    GPTQ_FUNCTION(aoti_torch_call_dispatcher);
    GPTQ_FUNCTION(aoti_torch_get_data_ptr);
    GPTQ_FUNCTION(aoti_torch_get_dim);
    GPTQ_FUNCTION(aoti_torch_get_sizes);
    GPTQ_FUNCTION(aoti_torch_get_strides);
    GPTQ_FUNCTION(aoti_torch_get_dtype);
    GPTQ_FUNCTION(aoti_torch_get_device_type);
    GPTQ_FUNCTION(aoti_torch_empty_strided);
    GPTQ_FUNCTION(aoti_torch_delete_tensor_object);
    GPTQ_FUNCTION(aoti_torch_dtype_float32);
    GPTQ_FUNCTION(aoti_torch_dtype_bfloat16);
    GPTQ_FUNCTION(aoti_torch_dtype_float16);
    GPTQ_FUNCTION(aoti_torch_device_type_cpu);
    GPTQ_FUNCTION(torch_get_num_threads);
#undef GPTQ_FUNCTION
}

void check(int32_t code) {
    if (!code) return;
    throw std::runtime_error(
        "gptq_backend::cpu_gemm_inference: torch could not do what this product needs; "
        "torch.ops.gptq_backend.cpu_gemm with the same arguments says why");
}

// A tensor that somebody else owns, or none.
struct Tensor {
    explicit Tensor(Value value) : handle(reinterpret_cast<Handle>(value)) {
        if (!handle) return;
        check(torch.aoti_torch_get_dim(handle, &dim));
        check(torch.aoti_torch_get_sizes(handle, &sizes));
        check(torch.aoti_torch_get_strides(handle, &strides));
        check(torch.aoti_torch_get_dtype(handle, &torch_dtype));
        check(torch.aoti_torch_get_data_ptr(handle, &data));
    }

    // The last dimension is `size`, and the tensor is on a CPU.
    bool fits(int64_t size) const {
        int32_t device;
        check(torch.aoti_torch_get_device_type(handle, &device));
        return device == torch.aoti_torch_device_type_cpu() && dim > 0 && sizes[dim - 1] == size;
    }

    bool contiguous() const {
        int64_t expected = 1;
        for (int64_t i = dim - 1; i >= 0; --i) {
            if (sizes[i] != 1 && strides[i] != expected) return false;
            expected *= sizes[i];
        }
        return true;
    }

    // False for what the kernels do not compute in.
    bool find_dtype(Dtype* dtype) const {
        const int32_t types[] = {torch.aoti_torch_dtype_float32(), torch.aoti_torch_dtype_bfloat16(),
                                 torch.aoti_torch_dtype_float16()};
        const auto* found = std::find(std::begin(types), std::end(types), torch_dtype);
        *dtype = Dtype(found - types);
        return found != std::end(types);
    }

    Handle handle;
    int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
    int32_t torch_dtype = -1;
    void* data = nullptr;
};

// The operator's arguments, which a kernel owns until it hands them on.
class Arguments {
  public:
    explicit Arguments(Value* stack) : stack_(stack) {}
    ~Arguments() {
        if (handed_on_) return;
        for (int i : {kX, kWords, kScales, kBlocks}) drop(stack_[i]);
        for (int i : {kZeros, kPerm, kBias}) {
            if (!stack_[i]) continue;
            drop(*reinterpret_cast<Value*>(stack_[i]));
            delete reinterpret_cast<Value*>(stack_[i]);
        }
    }
    Value operator[](int i) const { return stack_[i]; }
    Value optional(int i) const { return stack_[i] ? *reinterpret_cast<Value*>(stack_[i]) : 0; }
    void hand_on(const char* name) {
        handed_on_ = true;
        check(torch.aoti_torch_call_dispatcher(name, "", stack_));
    }

    enum { kX, kWords, kScales, kZeros, kPerm, kBlocks, kInFeatures, kOutFeatures, kBits, kA8, kBias };

  private:
    static void drop(Value value) { torch.aoti_torch_delete_tensor_object(reinterpret_cast<Handle>(value)); }

    Value* stack_;
    bool handed_on_ = false;
};

// A tensor that nobody else owns, until it is released.
struct Delete {
    void operator()(TensorObject* handle) const { torch.aoti_torch_delete_tensor_object(handle); }
};
using Owned = std::unique_ptr<TensorObject, Delete>;

Owned empty(const std::vector<int64_t>& sizes, int32_t dtype) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * std::max<int64_t>(1, sizes[i]);
    Handle handle;
    check(torch.aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                         torch.aoti_torch_device_type_cpu(), 0, &handle));
    return Owned(handle);
}

// Null for what needs a conversion, or is wrong.
Owned multiply(const Arguments& in) {
    const Tensor x(in[in.kX]), words(in[in.kWords]), scales(in[in.kScales]), zeros(in.optional(in.kZeros)),
        perm(in.optional(in.kPerm)), blocks(in[in.kBlocks]), bias(in.optional(in.kBias));
    Call call{};
    Weight& w = call.weight;
    w.in_features = int(in[in.kInFeatures]);
    w.out_features = int(in[in.kOutFeatures]);
    w.bits = int(in[in.kBits]);
    call.a8 = in[in.kA8] & 1;
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
    std::vector<int64_t> sizes(x.sizes, x.sizes + x.dim);
    call.rows = 1;
    for (int64_t i = 0; i + 1 < x.dim; ++i) call.rows *= int(sizes[i]);
    sizes.back() = w.out_features;
    Owned y = empty(sizes, x.torch_dtype);
    call.x = x.data;
    call.bias = bias.data;
    call.y = Tensor(reinterpret_cast<Value>(y.get())).data;
    uint32_t threads;
    check(torch.torch_get_num_threads(&threads));
    gemm({call}, int(threads));
    return y;
}

void kernel(Value* stack, uint64_t, uint64_t) {
    Owned y;
    {
        Arguments arguments(stack);
        y = multiply(arguments);
        if (!y) return arguments.hand_on("gptq_backend::cpu_gemm");
    }
    stack[0] = reinterpret_cast<Value>(y.release());
}

}  // namespace

std::vector<std::string> torch_functions() {
    std::vector<std::string> names;
    each_function([&](const char* name, void**) { names.push_back(name); });
    return names;
}

void register_with_torch(const std::string& name, const std::map<std::string, uintptr_t>& functions) {
    each_function([&](const char* each, void** address) { *address = reinterpret_cast<void*>(functions.at(each)); });
    void* library;  // for as long as the process lives
    check(torch.aoti_torch_library_init_impl("gptq_backend", "CPU", __FILE__, __LINE__, &library));
    check(torch.aoti_torch_library_impl(library, name.c_str(), kernel));
}

}  // namespace gptq
