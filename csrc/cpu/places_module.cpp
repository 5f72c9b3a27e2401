// Looks up many entries of Python dictionaries at once. A loop in Python takes ten times as long, on the way of every
// decoder layer's call. The caller's tuples own everything, so that Python's garbage collector sees what is held.
#include "places_module.h"

#include <stdexcept>

namespace py = pybind11;

namespace gptq {
namespace {

PyObject* find(const py::tuple& dicts, const py::tuple& keys, size_t i) {
    PyObject* const dict = PyTuple_GET_ITEM(dicts.ptr(), i);
    if (!PyDict_Check(dict)) throw std::invalid_argument("one of dicts is none");
    PyObject* const found = PyDict_GetItemWithError(dict, PyTuple_GET_ITEM(keys.ptr(), i));
    if (!found && PyErr_Occurred()) throw py::error_already_set();
    return found ? found : Py_None;
}

void check(const py::tuple& dicts, const py::tuple& others) {
    if (dicts.size() != others.size()) throw std::invalid_argument("tuples of different lengths");
}

// Whether each dictionary holds the very object, None where it holds nothing.
bool unchanged(const py::tuple& dicts, const py::tuple& keys, const py::tuple& values) {
    check(dicts, keys);
    check(dicts, values);
    for (size_t i = 0; i < dicts.size(); ++i) {
        if (find(dicts, keys, i) != PyTuple_GET_ITEM(values.ptr(), i)) return false;
    }
    return true;
}

// Whether all that they hold is nothing, or false as a condition.
bool empty(const py::tuple& dicts, const py::tuple& keys) {
    check(dicts, keys);
    for (size_t i = 0; i < dicts.size(); ++i) {
        const int truth = PyObject_IsTrue(find(dicts, keys, i));
        if (truth < 0) throw py::error_already_set();
        if (truth) return false;
    }
    return true;
}

}  // namespace

void bind_places(py::module_& m) {
    m.def("unchanged", &unchanged);
    m.def("empty", &empty);
}

}  // namespace gptq
