// Looks up many entries of Python dictionaries at once. A loop in Python takes ten times as long, on the way of every
// decoder layer's call. The caller's tuples own everything, so that Python's garbage collector sees what is held.
#include "places_module.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

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
// caches, and to wait for one dictionary after the other would take most of the time. First for what describes them,
void prefetch(const py::tuple& dicts) {
    for (size_t i = 0; i < dicts.size(); ++i) __builtin_prefetch(PyTuple_GET_ITEM(dicts.ptr(), i));
}

// then for what they hold,
void prefetch_tables(const py::tuple& dicts) {
    for (size_t i = 0; i < dicts.size(); ++i) {
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
bool hold(const py::tuple& dicts, const py::tuple& keys, const py::tuple& values) {
    check(dicts, keys);
    check(dicts, values);
    for (size_t i = 0; i < dicts.size(); ++i) {
        if (find(dicts, keys, i) != PyTuple_GET_ITEM(values.ptr(), i)) return false;
    }
    return true;
}

// Whether all that they hold is nothing, or false as a condition.
bool hold_nothing(const py::tuple& dicts, const py::tuple& keys) {
    check(dicts, keys);
    for (size_t i = 0; i < dicts.size(); ++i) {
        const auto found = py::reinterpret_borrow<py::object>(find(dicts, keys, i));  // code of its own may drop it
        const int truth = PyObject_IsTrue(found.ptr());
        if (truth < 0) throw py::error_already_set();
        if (truth) return false;
    }
    return true;
}

bool unchanged(const py::tuple& dicts, const py::tuple& keys, const py::tuple& values) {
    prefetch(dicts);
    prefetch_tables(dicts);
    return hold(dicts, keys, values);
}

bool empty(const py::tuple& dicts, const py::tuple& keys) {
    prefetch(dicts);
    prefetch_tables(dicts);
    return hold_nothing(dicts, keys);
}

// Both for each of some tuples, which begin with the five arguments.
bool untouched(const std::vector<py::tuple>& all) {
    const auto dicts = [](const py::tuple& each, int field) { return py::reinterpret_borrow<py::tuple>(each[field]); };
    for (const py::tuple& each : all) check(dicts(each, 0), dicts(each, 1)), check(dicts(each, 3), dicts(each, 4));
    for (const py::tuple& each : all) prefetch(dicts(each, 0)), prefetch(dicts(each, 3));
    for (const py::tuple& each : all) prefetch_tables(dicts(each, 0)), prefetch_tables(dicts(each, 3));
    // and for what lies there: hooks are dictionaries themselves.
    for (const py::tuple& each : all) {
        const py::tuple places = dicts(each, 3), keys = dicts(each, 4);
        for (size_t i = 0; i < places.size(); ++i) __builtin_prefetch(find(places, keys, i));
    }
    for (const py::tuple& each : all) {
        if (!hold(dicts(each, 0), dicts(each, 1), dicts(each, 2))) return false;
        if (!hold_nothing(dicts(each, 3), dicts(each, 4))) return false;
    }
    return true;
}

}  // namespace

void bind_places(py::module_& m) {
    m.def("unchanged", &unchanged);
    m.def("empty", &empty);
    m.def("untouched", &untouched);
}

}  // namespace gptq
