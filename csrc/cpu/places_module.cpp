// Looks up many entries of Python dictionaries at once. A loop in Python takes ten times as long, on the way of every
// decoder layer's call. The caller's tuples own everything, so that Python's garbage collector sees what is held.
#include "places_module.h"

#include <stdexcept>
#include <vector>

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

Py_ssize_t size_of(PyObject* tuple) {
    const Py_ssize_t size = PyTuple_Size(tuple);
    if (size < 0) throw python::Raised();
    return size;
}

// Entries of dictionaries, in tuples of one length.
struct Places {
    PyObject* dicts;
    PyObject* keys;
    PyObject* values;  // what they held, or null
    Py_ssize_t count;
};

Places places(PyObject* dicts, PyObject* keys, PyObject* values = nullptr) {
    const Py_ssize_t count = size_of(dicts);
    if (size_of(keys) != count || (values && size_of(values) != count)) {
        throw std::invalid_argument("tuples of different lengths");
    }
    return {dicts, keys, values, count};
}

// Asks for the memory of all dictionaries at a time. Weights that have passed by in between left little of it in the
// caches, and to wait for one dictionary after the other would take most of the time. First for what describes them,
void prefetch(const Places& all) {
    for (Py_ssize_t i = 0; i < all.count; ++i) __builtin_prefetch(PyTuple_GetItem(all.dicts, i));
}

// then for what they hold. Words 4 and 5 of a dictionary are the addresses of its keys and values in CPython 3.10 to
// 3.14; a wrong address would be no error, only of no use.
void prefetch_tables(const Places& all) {
    for (Py_ssize_t i = 0; i < all.count; ++i) {
        PyObject* const dict = PyTuple_GetItem(all.dicts, i);
        if (!PyDict_Check(dict)) continue;
        for (int word : {4, 5}) {
            const char* const part = reinterpret_cast<const char* const*>(dict)[word];
            for (int line = 0; part && line < 4; ++line) __builtin_prefetch(part + 64 * line);
        }
    }
}

// Whether each dictionary holds the very object, None where it holds nothing.
bool hold(const Places& all) {
    for (Py_ssize_t i = 0; i < all.count; ++i) {
        if (find(all.dicts, all.keys, i) != PyTuple_GetItem(all.values, i)) return false;
    }
    return true;
}

// Whether all that they hold is nothing, or false as a condition.
bool hold_nothing(const Places& all) {
    for (Py_ssize_t i = 0; i < all.count; ++i) {
        const python::Owned found(Py_NewRef(find(all.dicts, all.keys, i)));  // code of its own may drop it
        const int truth = PyObject_IsTrue(found.get());
        if (truth < 0) throw python::Raised();
        if (truth) return false;
    }
    return true;
}

bool unchanged(PyObject* dicts, PyObject* keys, PyObject* values) {
    const Places all = places(dicts, keys, values);
    prefetch(all);
    prefetch_tables(all);
    return hold(all);
}

bool empty(PyObject* dicts, PyObject* keys) {
    const Places all = places(dicts, keys);
    prefetch(all);
    prefetch_tables(all);
    return hold_nothing(all);
}

// Both for each of some tuples, which begin with the five arguments.
bool untouched(const std::vector<PyObject*>& tuples) {
    std::vector<Places> held, vacant;
    for (PyObject* each : tuples) {
        if (size_of(each) < 5) throw std::invalid_argument("a tuple of fewer than five fields");
        const auto field = [&](Py_ssize_t i) { return PyTuple_GetItem(each, i); };
        held.push_back(places(field(0), field(1), field(2)));
        vacant.push_back(places(field(3), field(4)));
    }
    for (size_t i = 0; i < held.size(); ++i) prefetch(held[i]), prefetch(vacant[i]);
    for (size_t i = 0; i < held.size(); ++i) prefetch_tables(held[i]), prefetch_tables(vacant[i]);
    // and for what lies there: hooks are dictionaries themselves.
    for (const Places& each : vacant) {
        for (Py_ssize_t i = 0; i < each.count; ++i) __builtin_prefetch(find(each.dicts, each.keys, i));
    }
    for (size_t i = 0; i < held.size(); ++i) {
        if (!hold(held[i]) || !hold_nothing(vacant[i])) return false;
    }
    return true;
}

// Whether two dictionaries have the same keys and hold the very same objects.
bool same(PyObject* a, PyObject* b) {
    if (!PyDict_Check(a) || !PyDict_Check(b)) throw std::invalid_argument("one of two dicts is none");
    if (PyDict_Size(a) != PyDict_Size(b)) return false;
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(a, &at, &key, &value);) {
        PyObject* const found = PyDict_GetItemWithError(b, key);
        if (!found && PyErr_Occurred()) throw python::Raised();
        if (found != value) return false;
    }
    return true;
}

}  // namespace

void bind_places(PyObject* module) {
    using namespace python;
    static const std::vector<PyMethodDef> functions = {
        function<&unchanged, kWithPython>("unchanged"),
        function<&empty, kWithPython>("empty"),
        function<&untouched, kWithPython>("untouched"),
        function<&same, kWithPython>("same"),
    };
    add_functions(module, functions);
}

}  // namespace gptq
