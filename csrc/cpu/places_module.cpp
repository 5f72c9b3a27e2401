// Looks up many entries of Python dictionaries at once. A loop in Python takes ten times as long, on the way of every
// decoder layer's call. The caller's tuples own everything, so that Python's garbage collector sees what is held.
#include "places_module.h"

#include <stdexcept>

namespace gptq {
namespace {

// Borrowed; the tuples' lengths were checked.
PyObject* find(PyObject* dicts, PyObject* keys, Py_ssize_t i) {
    PyObject* const dict = PyTuple_GetItem(dicts, i);
    if (!PyDict_Check(dict)) throw std::invalid_argument("one of dicts is none");
    PyObject* const found = PyDict_GetItemWithError(dict, PyTuple_GetItem(keys, i));
    if (!found && PyErr_Occurred()) throw python::Raised();
    return found ? found : Py_None;
}

// Asks for the memory of all dictionaries at a time. Weights that have passed by in between left little of it in the
// caches, and to wait for one dictionary after the other would take most of the time. Words 4 and 5 of a dictionary are
// the addresses of its keys and values in CPython 3.10 to 3.14; a wrong address would be no error, only of no use.
void prefetch(PyObject* dicts, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; ++i) __builtin_prefetch(PyTuple_GetItem(dicts, i));
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* const dict = PyTuple_GetItem(dicts, i);
        if (!PyDict_Check(dict)) continue;
        for (int word : {4, 5}) {
            const char* const part = reinterpret_cast<const char* const*>(dict)[word];
            for (int line = 0; part && line < 4; ++line) __builtin_prefetch(part + 64 * line);
        }
    }
}

Py_ssize_t size_of_all(std::initializer_list<PyObject*> tuples) {
    Py_ssize_t found = -1;
    for (PyObject* tuple : tuples) {
        const Py_ssize_t size = PyTuple_Size(tuple);
        if (size < 0) throw python::Raised();
        if (found >= 0 && size != found) throw std::invalid_argument("tuples of different lengths");
        found = size;
    }
    return found;
}

// Whether each dictionary holds the very object, None where it holds nothing.
bool unchanged(PyObject* dicts, PyObject* keys, PyObject* values) {
    const Py_ssize_t count = size_of_all({dicts, keys, values});
    prefetch(dicts, count);
    for (Py_ssize_t i = 0; i < count; ++i) {
        if (find(dicts, keys, i) != PyTuple_GetItem(values, i)) return false;
    }
    return true;
}

// Whether all that they hold is nothing, or false as a condition.
bool empty(PyObject* dicts, PyObject* keys) {
    const Py_ssize_t count = size_of_all({dicts, keys});
    prefetch(dicts, count);
    for (Py_ssize_t i = 0; i < count; ++i) {
        const python::Owned found(Py_NewRef(find(dicts, keys, i)));  // code of its own may drop it
        const int truth = PyObject_IsTrue(found.get());
        if (truth < 0) throw python::Raised();
        if (truth) return false;
    }
    return true;
}

}  // namespace

void bind_places(PyObject* module) {
    using namespace python;
    static const std::vector<PyMethodDef> functions = {
        function<&unchanged, kWithPython>("unchanged"),
        function<&empty, kWithPython>("empty"),
    };
    add_functions(module, functions);
}

}  // namespace gptq
