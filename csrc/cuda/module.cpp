// Python bindings. Tensors arrive as addresses and sizes, so that one build serves every version of torch; the caller,
// gptq_backend/kernels/cuda/operators.py, owns the checks.
#include "../python/binding.h"
#include "driver.h"
#include "launch.h"
#include "modules.h"

namespace gptq {

// A bytes object, which lives as long as the call and ends with a zero.
struct Image {
    const char* data;
};

namespace python {
template <>
struct From<Image> {
    static Image read(PyObject* object) {
        char* data = nullptr;
        Py_ssize_t size = 0;
        if (PyBytes_AsStringAndSize(object, &data, &size)) throw Raised();
        return {data};
    }
};
template <>
struct IsValue<Image> : std::true_type {};
}  // namespace python

}  // namespace gptq

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

gptq::Weight weight(uintptr_t words, uintptr_t scales, int scales_dtype, uintptr_t zeros, int bits, int out_features,
                    int strips, int tiles, int chunks) {
    return {at<uint32_t>(words),
            at<void>(scales),
            at<uint8_t>(zeros),
            gptq::Dtype(scales_dtype),
            bits,
            out_features,
            strips,
            tiles,
            chunks,
            2 * tiles / chunks};
}

void multiply(int device, const gptq::Weight& weight, uintptr_t x, int dtype, int rows, int columns, uintptr_t bias,
              int bias_dtype, uintptr_t y, uintptr_t partials, int strips, int tokens, int warps, int splits,
              uintptr_t stream) {
    const gptq::Product product{weight,          at<uint16_t>(x),    rows,
                                columns,         at<void>(bias),     gptq::Dtype(bias_dtype),
                                at<uint16_t>(y), at<float>(partials)};
    gptq::multiply(device, product, gptq::Dtype(dtype), {strips, tokens, warps, splits}, at<void>(stream));
}

void dequantize(int device, const gptq::Weight& weight, int first, int channels, int columns, uintptr_t to, int dtype,
                uintptr_t stream) {
    gptq::dequantize(device, weight, first, channels, columns, at<void>(to), gptq::Dtype(dtype), at<void>(stream));
}

void gather(int device, int bits, uintptr_t x, int rows, int columns, int element_bytes, uintptr_t perm, int slots,
            uintptr_t to, uintptr_t stream) {
    gptq::gather(device, bits, at<void>(x), rows, columns, element_bytes, at<int32_t>(perm), slots, at<void>(to),
                 at<void>(stream));
}

void open_driver(const std::string& library) {
    gptq::forget();
    gptq::driver::open(library);
}

int64_t capability(int device) {
    return gptq::capability(device);
}

void load(int device, int bits, gptq::Image image) {
    gptq::load(device, bits, image.data);
}

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "gptq_backend._cuda",
                          "Launches the CUDA kernels of gptq_backend; see csrc/cuda and docs/kernels.md.", -1, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cuda() {
    using namespace gptq::python;
    static const std::vector<PyMethodDef> functions = {
        function<&open_driver>("open_driver"), function<&capability>("capability"), function<&load>("load"),
        function<&multiply>("multiply"),       function<&dequantize>("dequantize"), function<&gather>("gather"),
    };
    return make_module(&definition, [&](PyObject* module) {
        add_functions(module, functions);
        add_type<&weight>(module, "gptq_backend._cuda.Weight");
    });
}
