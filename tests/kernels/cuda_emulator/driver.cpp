// A stand-in for NVIDIA's driver, by the names of its library: modules are the listed kernels, whatever their image
// says, and a launch runs one. It writes down what was asked of it, and fails where a test wants it to.
#include <map>
#include <set>
#include <string>

#include "instructions.cuh"

using Status = int;
struct Handle {};

namespace {

constexpr Status kInvalidValue = 1, kNotFound = 500;
std::map<std::string, Status> failures;
std::set<std::string> missing;  // kernels
std::string calls;
int compute_capability = 80;
Handle contexts[4];
Handle* current = nullptr;
int modules = 0;
unsigned last_shared_bytes = 0;  // of a launch

// Writes a call down -> what it returns.
Status called(const std::string& function, const std::string& what = "") {
    calls += function + (what.empty() ? "" : " " + what) + "\n";
    const auto found = failures.find(function);
    return found == failures.end() ? 0 : found->second;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// -- for tests

API void emulator_seed(uint64_t seed) {
    emulator::seed = seed;
}
API void emulator_reset(int capability) {
    failures.clear();
    missing.clear();
    calls.clear();
    compute_capability = capability;
    current = nullptr;
}
API void emulator_fail(const char* function, Status status) {
    failures[function] = status;
}
API void emulator_forget_kernel(const char* name) {
    missing.insert(name);
}
API const char* emulator_calls() {
    return calls.c_str();
}
// "NAME SIZE SIZE ...\n" for each kernel: what its arguments take.
API const char* emulator_kernels() {
    static std::string text;
    text.clear();
    for (const auto& [name, kernel] : emulator::kernels()) {
        text += name;
        for (size_t size : kernel.sizes) text += " " + std::to_string(size);
        text += "\n";
    }
    return text.c_str();
}

API unsigned emulator_shared_bytes() {
    return last_shared_bytes;
}

// -- the driver's functions

API Status cuInit(unsigned) {
    return called("cuInit");
}
API Status cuGetErrorName(Status status, const char** name) {
    static const std::map<Status, const char*> names = {{100, "CUDA_ERROR_NO_DEVICE"},
                                                        {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
                                                        {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"},
                                                        {500, "CUDA_ERROR_NOT_FOUND"},
                                                        {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"}};
    const auto found = names.find(status);
    *name = found == names.end() ? nullptr : found->second;
    return found == names.end() ? kInvalidValue : 0;
}
API Status cuGetErrorString(Status status, const char** text) {
    *text = status == 700 ? nullptr : "the text of this error";
    return 0;
}
API Status cuDeviceGet(int* device, int ordinal) {
    *device = ordinal + 100;  // a handle is not an index
    return called("cuDeviceGet");
}
API Status cuDeviceGetAttribute(int* value, int attribute, int device) {
    if (device < 100) return kInvalidValue;
    *value = attribute == 75   ? compute_capability / 10
             : attribute == 76 ? compute_capability % 10
             : attribute == 97 ? int(emulator::shared_limit)
                               : -1;
    return called("cuDeviceGetAttribute", std::to_string(attribute));
}
API Status cuDevicePrimaryCtxRetain(Handle** context, int device) {
    *context = &contexts[device - 100];
    return called("cuDevicePrimaryCtxRetain");
}
API Status cuCtxGetCurrent(Handle** context) {
    *context = current;
    return 0;
}
API Status cuCtxPushCurrent_v2(Handle* context) {
    current = context;
    return called("cuCtxPushCurrent");
}
API Status cuCtxPopCurrent_v2(Handle** context) {
    *context = current;
    current = nullptr;
    return called("cuCtxPopCurrent");
}
API Status cuThreadExchangeStreamCaptureMode(int* mode) {
    static int now = 0;
    std::swap(now, *mode);
    return called("cuThreadExchangeStreamCaptureMode", std::to_string(now));
}
API Status cuModuleLoadData(Handle** module, const void* image) {
    if (!current) return kInvalidValue;
    static Handle handles[256];
    *module = &handles[modules++ % 256];
    return called("cuModuleLoadData", std::string(static_cast<const char*>(image)).substr(0, 80));
}
API Status cuModuleUnload(Handle*) {
    return called("cuModuleUnload");
}
API Status cuModuleGetFunction(emulator::Kernel** function, Handle*, const char* name) {
    const auto found = emulator::kernels().find(name);
    if (found == emulator::kernels().end() || missing.count(name)) return kNotFound;
    *function = &found->second;
    return called("cuModuleGetFunction", name);
}
API Status cuFuncSetAttribute(emulator::Kernel* function, int attribute, int value) {
    return function && attribute == 8 && value == int(emulator::shared_limit) ? called("cuFuncSetAttribute")
                                                                              : kInvalidValue;
}
API Status cuLaunchKernel(emulator::Kernel* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned,
                          unsigned, unsigned shared_bytes, Handle*, void** arguments, void**) {
    if (!current || !x || !y || !z) return kInvalidValue;
    if (threads > 1024 || shared_bytes > emulator::shared_limit || y > 65535 || z > 65535) return kInvalidValue;
    last_shared_bytes = shared_bytes;
    if (const Status status = called("cuLaunchKernel")) return status;
    function->launch(dim3(x, y, z), threads, shared_bytes, arguments);
    return 0;
}
