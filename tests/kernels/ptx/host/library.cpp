// What Python calls, by ctypes. The kernels that it makes are those of the stand-in for NVIDIA's driver
// (../../cuda_emulator/driver.cpp), so that the extension launches them as it would on a GPU.
#include <algorithm>
#include <memory>

#include "instructions.cuh"
#include "machine.h"

namespace {

ptx::GlobalMemory global;
std::map<std::string, std::shared_ptr<ptx::Program>> programs;

const ptx::Operations& operations() {
    static const ptx::Operations all = [] {
        ptx::Operations made;
        ptx::add_arithmetic(made);
        ptx::add_conversions(made);
        ptx::add_transfers(made);
        ptx::add_warp_operations(made);
        return made;
    }();
    return all;
}

void launch(const ptx::Program& program, dim3 grid, int threads, size_t shared_bytes, void** arguments) {
    std::vector<unsigned char> parameters;
    for (size_t i = 0; i < program.parameters.size(); ++i) {
        const auto [offset, bytes] = program.parameters[i];
        parameters.resize(offset + bytes);
        std::memcpy(&parameters[offset], arguments[i], bytes);
    }
    for (size_t at = 0; at + 8 <= parameters.size(); at += 8) {
        uint64_t word;
        std::memcpy(&word, &parameters[at], 8);
        word = global.translate(word);
        std::memcpy(&parameters[at], &word, 8);
    }
    ptx::run(program, {grid.x, grid.y, grid.z}, threads, shared_bytes, parameters, global, emulator::seed);
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// Begins a kernel, in the place of one of the same name. parameters: offset and bytes of each.
API void ptx_begin(const char* name, int slots, const size_t* parameters, int count) {
    const auto made = std::make_shared<ptx::Program>();
    *made = {name, slots, {}, {}, {}};
    emulator::Kernel& kernel = emulator::kernels()[name];
    kernel.sizes.clear();
    for (int i = 0; i < count; ++i) {
        made->parameters.push_back({parameters[2 * i], parameters[2 * i + 1]});
        kernel.sizes.push_back(parameters[2 * i + 1]);
    }
    kernel.launch = [made](dim3 grid, int threads, size_t shared_bytes, void** arguments) {
        launch(*made, grid, threads, shared_bytes, arguments);
    };
    programs[name] = made;
}

API void ptx_constant(const char* name, int slot, uint64_t value) {
    programs.at(name)->constants.push_back({slot, value});
}

// -> whether the operation is known.
API bool ptx_instruction(const char* name, const char* operation, int guard, bool negated, const int* operands,
                         int count, const char* text) {
    const auto found = operations().find(operation);
    if (found == operations().end()) return false;
    programs.at(name)->code.push_back({&found->second, guard, negated, {operands, operands + count}, text, 0});
    return true;
}

// Memory that launches may touch from now on.
API void ptx_add_tensor(uintptr_t start, size_t bytes) {
    global.add(start, bytes);
}

API void ptx_forget_tensors() {
    global.clear();
}

// How often each instruction was executed by a warp or a part of it.
API void ptx_executed(const char* name, uint64_t* counts) {
    for (const ptx::Instruction& each : programs.at(name)->code) *counts++ = each.executed;
}

// Launches without the driver -> null, or what the kernel did wrong.
API const char* ptx_launch(const char* name, unsigned x, unsigned y, unsigned z, int threads, size_t shared_bytes,
                           void** arguments) {
    static std::string message;
    try {
        emulator::kernels().at(name).launch(dim3(x, y, z), threads, shared_bytes, arguments);
        return nullptr;
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
}
