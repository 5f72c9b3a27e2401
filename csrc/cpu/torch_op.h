// Operators as kernels of torch's dispatcher, for callers that are compiled graphs: they reach them without Python.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace gptq {

// Functions of libtorch's stable C interface that the kernels call.
std::vector<std::string> torch_functions();

// Makes `name` of the namespace gptq_backend, whose schema is in gptq_backend/kernels, one of these kernels on CPUs:
// cpu_gemm_inference, cpu_start_layer_inference or cpu_end_layer_inference. `functions` holds the address of each of
// torch_functions(). Throws std::runtime_error where torch refuses, std::out_of_range for another name.
void register_with_torch(const std::string& name, const std::map<std::string, uintptr_t>& functions);

}  // namespace gptq
