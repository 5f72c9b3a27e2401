// libtorch's stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h and torch/csrc/stable/c/shim.h of torch 2.10),
// for kernels of torch's dispatcher. Its functions arrive as addresses at run time: no torch header, and one build for
// every version of torch that has it.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernel.h"

namespace gptq {

struct TensorObject;
using Handle = TensorObject*;
using Value = uint64_t;  // an argument or a result: a Handle, an integer, or the address of an optional's Value
using Kernel = void (*)(Value*, uint64_t, uint64_t);

struct TorchFunctions {
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
    int32_t (*aoti_torch_dtype_int64)();
    int32_t (*aoti_torch_device_type_cpu)();
    int32_t (*torch_get_num_threads)(uint32_t*);
};
extern TorchFunctions torch;

// Names of the functions above.
std::vector<std::string> torch_functions();

// Makes operator `name` of the namespace gptq_backend this kernel on CPUs. `functions` holds the address of each of
// torch_functions(). Throws std::runtime_error where torch refuses.
void register_kernel(const char* name, Kernel, const std::map<std::string, uintptr_t>& functions);

// Throws std::runtime_error if a function of libtorch has failed.
void check_torch(int32_t code);

int torch_threads();

// A tensor that somebody else owns, or none.
struct TensorView {
    explicit TensorView(Value value);

    // The last dimension is `size`, and the tensor is on a CPU.
    bool fits(int64_t size) const;
    bool contiguous() const;
    // False for what the kernels do not compute in.
    bool find_dtype(Dtype* dtype) const;
    // Of all dimensions but the last.
    int rows() const;
    // Its sizes, with another last one.
    std::vector<int64_t> with_last(int64_t size) const;

    Handle handle;
    int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
    int32_t torch_dtype = -1;
    void* data = nullptr;
};

// A tensor that nobody else owns, until it is released.
struct DeleteTensor {
    void operator()(TensorObject* handle) const { torch.aoti_torch_delete_tensor_object(handle); }
};
using OwnedTensor = std::unique_ptr<TensorObject, DeleteTensor>;

// A contiguous one on a CPU, without values.
OwnedTensor empty_tensor(const std::vector<int64_t>& sizes, int32_t torch_dtype);

inline void* data_of(const OwnedTensor& tensor) {
    return TensorView(reinterpret_cast<Value>(tensor.get())).data;
}

// An operator's arguments, which a kernel owns until it hands them on.
class Arguments {
  public:
    // tensors, optionals: which of the arguments are such; the others are numbers.
    Arguments(Value* stack, std::initializer_list<int> tensors, std::initializer_list<int> optionals)
        : stack_(stack), tensors_(set_of(tensors)), optionals_(set_of(optionals)) {}
    Arguments(const Arguments&) = delete;
    ~Arguments();

    Value operator[](int i) const { return stack_[i]; }
    Value optional(int i) const { return stack_[i] ? *reinterpret_cast<Value*>(stack_[i]) : 0; }
    // Let the operator `name`, which takes the same, do what this one cannot.
    void hand_on(const char* name);

  private:
    // Bit i stands for argument i.
    static uint32_t set_of(std::initializer_list<int> numbers) {
        uint32_t set = 0;
        for (int i : numbers) set |= 1u << i;
        return set;
    }

    Value* stack_;
    uint32_t tensors_, optionals_;
    bool handed_on_ = false;
};

}  // namespace gptq
