#include "modules.h"

#include <atomic>
#include <memory>
#include <mutex>
#include <stdexcept>

namespace gptq {
namespace {

using driver::api;
using driver::check;

constexpr int kDevices = 64;
constexpr int kWidths[] = {2, 3, 4, 8};
std::atomic<const Kernels*> loaded[kDevices][4];  // never freed: a launch may be on its way
std::mutex loading;

std::atomic<const Kernels*>& place(int device, int bits) {
    if (device < 0 || device >= kDevices)
        throw std::invalid_argument("CUDA device " + std::to_string(device) + ", expected 0.." +
                                    std::to_string(kDevices - 1));
    for (int i = 0; i < 4; ++i)
        if (kWidths[i] == bits) return loaded[device][i];
    throw std::invalid_argument("bits is " + std::to_string(bits) + ", expected 2, 3, 4 or 8");
}

int handle(int device) {
    int found = 0;
    check(api().get_device(&found, device), "cuDeviceGet");
    return found;
}

int attribute(int device, int which) {
    int value = 0;
    check(api().get_attribute(&value, which, handle(device)), "cuDeviceGetAttribute");
    return value;
}

// Lets this thread load while another one, or itself, captures a graph.
class Relaxed {
  public:
    Relaxed() { check(api().exchange_capture_mode(&mode_), "cuThreadExchangeStreamCaptureMode"); }
    Relaxed(const Relaxed&) = delete;
    Relaxed& operator=(const Relaxed&) = delete;
    ~Relaxed() { api().exchange_capture_mode(&mode_); }

  private:
    int mode_ = driver::kRelaxed;
};

void find_all(Kernels& to, driver::Module module, int bits) {
    const auto find = [&](Kernel& kernel, const std::string& kind, const std::string& type) {
        kernel.name = "gptq_" + kind + "_" + std::to_string(bits) + "_" + type;
        check(api().get_function(&kernel.function, module, kernel.name.c_str()), "looking for " + kernel.name);
    };
    const char* const types[] = {"f32", "bf16", "f16"};  // by Dtype
    const char* const tokens[] = {"2", "4", "8"};
    for (int type = 0; type < 2; ++type) {
        for (int strips = 1; strips <= 2; ++strips)
            for (int blocks = 1; blocks <= 2; ++blocks)
                find(to.skinny[type][strips - 1][blocks - 1],
                     "skinny_" + std::to_string(strips) + "_" + std::to_string(blocks), types[type + 1]);
        for (int i = 0; i < 3; ++i) {
            Kernel& wide = to.wide[type][i];
            find(wide, std::string("wide_") + tokens[i], types[type + 1]);
            // Without this a block has 48 KB.
            check(api().set_function_attribute(wide.function, driver::kDynamicSharedBytes, to.shared_bytes),
                  "shared memory of " + wide.name);
        }
        find(to.reduce[type], "reduce", types[type + 1]);
        find(to.gather[type], "gather", type ? "4" : "2");
    }
    for (int type = 0; type < 3; ++type) find(to.dequantize[type], "dequantize", types[type]);
}

}  // namespace

int capability(int device) {
    return attribute(device, driver::kMajor) * 10 + attribute(device, driver::kMinor);
}

void load(int device, int bits, const char* image) {
    auto& place_ = place(device, bits);
    const std::lock_guard<std::mutex> lock(loading);
    if (place_.load()) return;
    auto made = std::make_unique<Kernels>();
    check(api().retain_primary_context(&made->context, handle(device)), "cuDevicePrimaryCtxRetain");
    const driver::Current current(made->context);
    const Relaxed relaxed;
    driver::Module module = nullptr;
    check(api().load_module(&module, image), "cuModuleLoadData");
    try {
        made->shared_bytes = attribute(device, driver::kSharedBytesPerBlock);
        find_all(*made, module, bits);
    } catch (...) {
        api().unload_module(module);
        throw;
    }
    place_ = made.release();
}

const Kernels& kernels(int device, int bits) {
    const Kernels* const found = place(device, bits).load();
    if (!found)
        throw std::runtime_error("no kernels for " + std::to_string(bits) + " bits were loaded on CUDA device " +
                                 std::to_string(device));
    return *found;
}

void forget() {
    for (auto& device : loaded)
        for (auto& each : device) each = nullptr;
}

}  // namespace gptq
