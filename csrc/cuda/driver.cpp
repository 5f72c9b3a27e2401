#include "driver.h"

#include <dlfcn.h>

#include <stdexcept>

namespace gptq::driver {
namespace {

Api functions{};

template <class F>
void look_up(F& function, void* library, const char* file, const char* name) {
    function = reinterpret_cast<F>(dlsym(library, name));
    if (!function) throw std::runtime_error(std::string(file) + " has no " + name + "; the NVIDIA driver is too old");
}

}  // namespace

void open(const std::string& file) {
    void* const library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library)
        throw std::runtime_error("the library of the NVIDIA driver cannot be loaded (" + std::string(dlerror()) + ")");
    Api found{};
    const auto get = [&](auto& function, const char* name) { look_up(function, library, file.c_str(), name); };
    get(found.init, "cuInit");
    get(found.error_name, "cuGetErrorName");
    get(found.error_text, "cuGetErrorString");
    get(found.get_device, "cuDeviceGet");
    get(found.get_attribute, "cuDeviceGetAttribute");
    get(found.retain_primary_context, "cuDevicePrimaryCtxRetain");
    get(found.get_current_context, "cuCtxGetCurrent");
    get(found.push_context, "cuCtxPushCurrent_v2");
    get(found.pop_context, "cuCtxPopCurrent_v2");
    get(found.exchange_capture_mode, "cuThreadExchangeStreamCaptureMode");
    get(found.load_module, "cuModuleLoadData");
    get(found.unload_module, "cuModuleUnload");
    get(found.get_function, "cuModuleGetFunction");
    get(found.set_function_attribute, "cuFuncSetAttribute");
    get(found.launch, "cuLaunchKernel");
    functions = found;
    check(functions.init(0), "cuInit");
}

const Api& api() {
    return functions;
}

void check(int status, const std::string& what) {
    if (status == 0) return;
    const char *name = nullptr, *text = nullptr;
    functions.error_name(status, &name);
    functions.error_text(status, &text);
    throw std::runtime_error(what + " failed with " + (name ? name : "an unknown error") + " (" +
                             std::to_string(status) + ")" + (text ? ": " + std::string(text) : ""));
}

Current::Current(Context context) {
    // A thread that torch has not used on this device has another one, or none.
    Context current = nullptr;
    check(functions.get_current_context(&current), "cuCtxGetCurrent");
    pushed_ = current != context;
    if (pushed_) check(functions.push_context(context), "cuCtxPushCurrent");
}

Current::~Current() {
    Context popped = nullptr;
    if (pushed_) functions.pop_context(&popped);
}

}  // namespace gptq::driver
