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

// Asks for the memory of all dictionaries at a time. Weights that have passed by in between left little of it in the
// caches, and to wait for one dictionary after the other would take most of the time.
void prefetch(const py::tuple& dicts) {
    const size_t count = dicts.size();
    for (size_t i = 0; i < count; ++i) __builtin_prefetch(PyTuple_GET_ITEM(dicts.ptr(), i));
    for (size_t i = 0; i < count; ++i) {
        PyObject* const dict = PyTuple_GET_ITEM(dicts.ptr(), i);
        if (!PyDict_Check(dict)) continue;
        const auto* const fields = reinterpret_cast<const PyDictObject*>(dict);
        for (const void* part :
             {static_cast<const void*>(fields->ma_keys), static_cast<const void*>(fields->ma_values)}) {
            for (int line = 0; part && line < 4; ++line) __builtin_prefetch(static_cast<const char*>(part) + 64 * line);
        }
    }
}

void check(const py::tuple& dicts, const py::tuple& others) {
    if (dicts.size() != others.size()) throw std::invalid_argument("tuples of different lengths");
}

// Whether each dictionary holds the very object, None where it holds nothing.
bool unchanged(const py::tuple& dicts, const py::tuple& keys, const py::tuple& values) {
    check(dicts, keys);
    check(dicts, values);
    prefetch(dicts);
    for (size_t i = 0; i < dicts.size(); ++i) {
        if (find(dicts, keys, i) != PyTuple_GET_ITEM(values.ptr(), i)) return false;
    }
    return true;
}

// Whether all that they hold is nothing, or false as a condition.
bool empty(const py::tuple& dicts, const py::tuple& keys) {
    check(dicts, keys);
    prefetch(dicts);
    for (size_t i = 0; i < dicts.size(); ++i) {
        const auto found = py::reinterpret_borrow<py::object>(find(dicts, keys, i));  // code of its own may drop it
        const int truth = PyObject_IsTrue(found.ptr());
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
