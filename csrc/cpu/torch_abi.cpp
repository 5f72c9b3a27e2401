#include "torch_abi.h"

#include <algorithm>
#include <stdexcept>

namespace gptq {

TorchFunctions torch;

namespace {

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
    GPTQ_FUNCTION(aoti_torch_dtype_int64);
    GPTQ_FUNCTION(aoti_torch_device_type_cpu);
    GPTQ_FUNCTION(torch_get_num_threads);
#undef GPTQ_FUNCTION
}

}  // namespace

void check_torch(int32_t code) {
    if (!code) return;
    throw std::runtime_error("a function of torch that an operator of gptq_backend called has failed");
}

int torch_threads() {
    uint32_t threads;
    check_torch(torch.torch_get_num_threads(&threads));
    return int(threads);
}

TensorView::TensorView(Value value) : handle(reinterpret_cast<Handle>(value)) {
    if (!handle) return;
    check_torch(torch.aoti_torch_get_dim(handle, &dim));
    check_torch(torch.aoti_torch_get_sizes(handle, &sizes));
    check_torch(torch.aoti_torch_get_strides(handle, &strides));
    check_torch(torch.aoti_torch_get_dtype(handle, &torch_dtype));
    check_torch(torch.aoti_torch_get_data_ptr(handle, &data));
}

bool TensorView::fits(int64_t size) const {
    int32_t device;
    check_torch(torch.aoti_torch_get_device_type(handle, &device));
    return device == torch.aoti_torch_device_type_cpu() && dim > 0 && sizes[dim - 1] == size;
}

bool TensorView::contiguous() const {
    int64_t expected = 1;
    for (int64_t i = dim - 1; i >= 0; --i) {
        if (sizes[i] != 1 && strides[i] != expected) return false;
        expected *= sizes[i];
    }
    return true;
}

bool TensorView::find_dtype(Dtype* dtype) const {
    const int32_t types[] = {torch.aoti_torch_dtype_float32(), torch.aoti_torch_dtype_bfloat16(),
                             torch.aoti_torch_dtype_float16()};
    const auto* found = std::find(std::begin(types), std::end(types), torch_dtype);
    *dtype = Dtype(found - types);
    return found != std::end(types);
}

int TensorView::rows() const {
    int64_t rows = 1;
    for (int64_t i = 0; i + 1 < dim; ++i) rows *= sizes[i];
    return int(rows);
}

std::vector<int64_t> TensorView::with_last(int64_t size) const {
    std::vector<int64_t> found(sizes, sizes + dim);
    found.back() = size;
    return found;
}

OwnedTensor empty_tensor(const std::vector<int64_t>& sizes, int32_t torch_dtype) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * std::max<int64_t>(1, sizes[i]);
    Handle handle;
    check_torch(torch.aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), torch_dtype,
                                               torch.aoti_torch_device_type_cpu(), 0, &handle));
    return OwnedTensor(handle);
}

Arguments::~Arguments() {
    if (handed_on_) return;
    const auto drop = [](Value value) { torch.aoti_torch_delete_tensor_object(reinterpret_cast<Handle>(value)); };
    for (int i = 0; (tensors_ | optionals_) >> i; ++i) {
        if (tensors_ >> i & 1) drop(stack_[i]);
        if (!(optionals_ >> i & 1) || !stack_[i]) continue;
        drop(*reinterpret_cast<Value*>(stack_[i]));
        delete reinterpret_cast<Value*>(stack_[i]);
    }
}

void Arguments::hand_on(const char* name) {
    handed_on_ = true;
    if (!torch.aoti_torch_call_dispatcher((std::string("gptq_backend::") + name).c_str(), "", stack_)) return;
    throw std::runtime_error(
        "an operator of gptq_backend was given what it cannot compute with; torch.ops.gptq_backend." +
        std::string(name) + " with the same arguments says why");
}

std::vector<std::string> torch_functions() {
    std::vector<std::string> names;
    each_function([&](const char* name, void**) { names.push_back(name); });
    return names;
}

void register_kernel(const char* name, Kernel kernel, const std::map<std::string, uintptr_t>& functions) {
    each_function([&](const char* each, void** address) { *address = reinterpret_cast<void*>(functions.at(each)); });
    void* library;  // for as long as the process lives
    check_torch(torch.aoti_torch_library_init_impl("gptq_backend", "CPU", __FILE__, __LINE__, &library));
    check_torch(torch.aoti_torch_library_impl(library, name, kernel));
}

}  // namespace gptq
