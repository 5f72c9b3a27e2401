// The functions of NVIDIA's driver that are called here. They are looked up at run time, so that a build needs neither
// a header nor a library of CUDA's, and runs with any driver that can run the machine code.
#pragma once
#include <string>

namespace gptq::driver {

using Context = struct CUctx_st*;
using Module = struct CUmod_st*;
using Function = struct CUfunc_st*;
using Stream = struct CUstream_st*;  // the runtime's streams, and so torch's, are the driver's

// As cuda.h declares them; CUresult, CUdevice and enumerations are int. 0 is success.
struct Api {
    int (*init)(unsigned flags);
    int (*error_name)(int error, const char** name);
    int (*error_text)(int error, const char** text);
    int (*get_device)(int* device, int ordinal);
    int (*get_attribute)(int* value, int attribute, int device);
    int (*retain_primary_context)(Context* context, int device);
    int (*get_current_context)(Context* context);
    int (*push_context)(Context context);
    int (*pop_context)(Context* context);
    int (*exchange_capture_mode)(int* mode);
    int (*load_module)(Module* module, const void* image);
    int (*unload_module)(Module module);
    int (*get_function)(Function* function, Module module, const char* name);
    int (*set_function_attribute)(Function function, int attribute, int value);
    int (*launch)(Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                  unsigned block_y, unsigned block_z, unsigned shared_bytes, Stream stream, void** arguments,
                  void** extra);
};

// Of CUdevice_attribute, CUfunction_attribute and CUstreamCaptureMode.
constexpr int kMajor = 75, kMinor = 76, kSharedBytesPerBlock = 97;
constexpr int kDynamicSharedBytes = 8;
constexpr int kRelaxed = 2;

// Looks all functions up in `library`, by default of the system's folders, and initializes the driver.
// Throws std::runtime_error: it is missing, lacks a function, or cannot be initialized.
void open(const std::string& library);

// After `open`.
const Api& api();

// Throws std::runtime_error, "WHAT failed with NAME (NUMBER): TEXT", unless status is 0.
void check(int status, const std::string& what);

// Makes a context the current one of this thread for a while.
class Current {
  public:
    explicit Current(Context context);
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;
    ~Current();

  private:
    bool pushed_;
};

}  // namespace gptq::driver
