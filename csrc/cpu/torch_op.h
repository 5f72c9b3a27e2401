// The product as a kernel of torch's dispatcher, for callers that are compiled graphs: they reach it without Python.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace gptq {

// Functions of libtorch's stable C interface that the kernel calls.
std::vector<std::string> torch_functions();

// Makes `name` of the namespace gptq_backend, which has the schema in gptq_backend/kernels/cpu.py, this kernel on CPUs.
// `functions` holds the address of each of torch_functions(). Throws std::runtime_error where torch refuses.
void register_with_torch(const std::string& name, const std::map<std::string, uintptr_t>& functions);

}  // namespace gptq
