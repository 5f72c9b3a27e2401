// The kernels that the driver has loaded, by device and by bits of the codes.
#pragma once
#include <string>

#include "arguments.h"
#include "driver.h"

namespace gptq {

struct Kernel {
    driver::Function function;
    std::string name;  // of device/kernels.cu
};

// One loaded module.
struct Kernels {
    driver::Context context;
    int shared_bytes;  // that a block may have
    // [0 for bf16, 1 for fp16]; skinny: [strips - 1][blocks of tokens - 1]; wide: 2, 4, 8 blocks.
    Kernel skinny[2][2][2];
    Kernel wide[2][3];
    Kernel reduce[2];
    Kernel dequantize[3];  // [Dtype]
    Kernel gather[2];      // elements of 2 and 4 bytes
};

// Compute capability of a device as 10 * major + minor.
int capability(int device);

// Loads a module for codes of `bits` bits on a device, unless there is one. It waits for nothing that runs there, and
// is allowed while a CUDA graph is captured. image: a cubin, a fatbin, or PTX that ends with a zero.
// Throws std::runtime_error: the driver refuses the image, or it lacks a kernel. std::invalid_argument: bits, device.
void load(int device, int bits, const char* image);

// Throws std::runtime_error where none was loaded.
const Kernels& kernels(int device, int bits);

// Forget what was loaded, before another driver is opened.
void forget();

}  // namespace gptq
