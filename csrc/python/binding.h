// Python functions and types from C++ ones, by CPython's stable ABI: one build serves every Python from 3.10 on.
// (pybind11 needs a build for each.) Numbers, addresses, strings, lists and tuples of them, and objects of Type<T> are
// all that the kernels pass.
#pragma once

#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <exception>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace gptq::python {

// An exception of Python is set.
struct Raised : std::exception {};

// Owns one reference; null is an error of Python's.
class Owned {
  public:
    explicit Owned(PyObject* object) : object_(object) {
        if (!object) throw Raised();
    }
    Owned(const Owned&) = delete;
    Owned& operator=(const Owned&) = delete;
    ~Owned() { Py_DECREF(object_); }
    PyObject* get() const { return object_; }

  private:
    PyObject* object_;
};

// A C++ type whose values Python holds; see add_type. Its members are the caller's to keep alive.
template <class T>
struct Type {
    PyObject_HEAD T value;
    inline static PyTypeObject* python = nullptr;
};

// -- from Python

// Checks that an object is a T and reads it.
template <class T, class = void>
struct From;

template <class T>
struct From<T, std::enable_if_t<std::is_integral_v<T> && !std::is_same_v<T, bool>>> {
    static T read(PyObject* object) {
        if constexpr (std::is_unsigned_v<T> && sizeof(T) == 8) {
            const unsigned long long found = PyLong_AsUnsignedLongLong(object);
            if (found == static_cast<unsigned long long>(-1) && PyErr_Occurred()) throw Raised();
            return found;
        } else {
            const long long found = PyLong_AsLongLong(object);
            if (found == -1 && PyErr_Occurred()) throw Raised();
            if (found != static_cast<long long>(static_cast<T>(found))) {
                PyErr_SetString(PyExc_OverflowError, "a number is too large for the kernels");
                throw Raised();
            }
            return static_cast<T>(found);
        }
    }
};

template <>
struct From<bool> {
    static bool read(PyObject* object) {
        const int found = PyObject_IsTrue(object);
        if (found < 0) throw Raised();
        return found;
    }
};

template <class T>
struct From<T, std::enable_if_t<std::is_floating_point_v<T>>> {
    static T read(PyObject* object) {
        const double found = PyFloat_AsDouble(object);
        if (found == -1 && PyErr_Occurred()) throw Raised();
        return static_cast<T>(found);
    }
};

template <>
struct From<PyObject*> {
    static PyObject* read(PyObject* object) { return object; }
};

template <>
struct From<std::string> {
    static std::string read(PyObject* object) {
        Py_ssize_t size = 0;
        const char* found = PyUnicode_AsUTF8AndSize(object, &size);
        if (!found) throw Raised();
        return {found, static_cast<size_t>(size)};
    }
};

template <class T>
const T* value_in(PyObject* object) {
    if (Py_TYPE(object) != Type<T>::python) {
        PyErr_Format(PyExc_TypeError, "got %R where an object of %R was expected", object, Type<T>::python);
        throw Raised();
    }
    return &reinterpret_cast<Type<T>*>(object)->value;
}

// An argument that is a pointer is None or an object of Type<T>; a reference, or an element of a list, cannot be None.
template <class T>
struct From<const T*> {
    static const T* read(PyObject* object) { return object == Py_None ? nullptr : value_in<T>(object); }
};

inline Py_ssize_t length_of(PyObject* object) {
    if (!PyTuple_Check(object) && !PyList_Check(object)) {
        PyErr_Format(PyExc_TypeError, "got %R where a list or a tuple was expected", object);
        throw Raised();
    }
    return PySequence_Size(object);
}

// An element of a list or a tuple, which keeps it.
inline PyObject* element(PyObject* object, Py_ssize_t i) {
    PyObject* const found = PyTuple_Check(object) ? PyTuple_GetItem(object, i) : PyList_GetItem(object, i);
    if (!found) throw Raised();
    return found;
}

template <class T>
struct From<std::vector<T>> {
    static std::vector<T> read(PyObject* object) {
        std::vector<T> found;
        for (Py_ssize_t i = 0; i < length_of(object); ++i) found.push_back(From<T>::read(element(object, i)));
        return found;
    }
};

template <class T>
struct From<std::vector<const T*>> {
    static std::vector<const T*> read(PyObject* object) {
        std::vector<const T*> found;
        for (Py_ssize_t i = 0; i < length_of(object); ++i) found.push_back(value_in<T>(element(object, i)));
        return found;
    }
};

inline void check_length(PyObject* object, size_t expected) {
    const Py_ssize_t size = length_of(object);
    if (size == static_cast<Py_ssize_t>(expected)) return;
    PyErr_Format(PyExc_TypeError, "got %zd values where %zu were expected", size, expected);
    throw Raised();
}

template <class T, size_t N>
struct From<std::array<T, N>> {
    static std::array<T, N> read(PyObject* object) {
        check_length(object, N);
        std::array<T, N> found;
        for (size_t i = 0; i < N; ++i) found[i] = From<T>::read(element(object, static_cast<Py_ssize_t>(i)));
        return found;
    }
};

template <class... T>
struct From<std::tuple<T...>> {
    static std::tuple<T...> read(PyObject* object) {
        check_length(object, sizeof...(T));
        return read_all(object, std::index_sequence_for<T...>());
    }

  private:
    template <size_t... I>
    static std::tuple<T...> read_all(PyObject* object, std::index_sequence<I...>) {
        return {From<T>::read(element(object, I))...};
    }
};

template <class T>
struct From<std::map<std::string, T>> {
    static std::map<std::string, T> read(PyObject* object) {
        const Owned items(PyMapping_Items(object));
        std::map<std::string, T> found;
        for (auto& [key, value] : From<std::vector<std::tuple<std::string, T>>>::read(items.get())) found[key] = value;
        return found;
    }
};

// -- to Python

inline PyObject* to_python(bool value) {
    return PyBool_FromLong(value);
}
inline PyObject* to_python(double value) {
    return PyFloat_FromDouble(value);
}
inline PyObject* to_python(int64_t value) {
    return PyLong_FromLongLong(value);
}
inline PyObject* to_python(const char* value) {
    return PyUnicode_FromString(value);
}
inline PyObject* to_python(const std::string& value) {
    return PyUnicode_FromStringAndSize(value.data(), static_cast<Py_ssize_t>(value.size()));
}

template <class T>
PyObject* to_python(const std::vector<T>& values) {
    Owned list(PyList_New(static_cast<Py_ssize_t>(values.size())));
    for (size_t i = 0; i < values.size(); ++i) {
        Owned element(to_python(values[i]));
        if (PyList_SetItem(list.get(), static_cast<Py_ssize_t>(i), Py_NewRef(element.get()))) throw Raised();
    }
    return Py_NewRef(list.get());
}

// -- calls

// Other threads may run Python meanwhile.
class Released {
  public:
    Released() : state_(PyEval_SaveThread()) {}
    Released(const Released&) = delete;
    Released& operator=(const Released&) = delete;
    ~Released() { PyEval_RestoreThread(state_); }

  private:
    PyThreadState* state_;
};

// What call() gives, or null with a Python exception in place of a C++ one.
template <class Call>
auto guarded(Call call) -> decltype(call()) {
    try {
        return call();
    } catch (const Raised&) {
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::out_of_range& error) {
        PyErr_SetString(PyExc_IndexError, error.what());
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

// How an argument of type A is read: references to types that Python holds by pointer, all else by value.
template <class A>
using Read = std::remove_cv_t<std::remove_reference_t<A>>;

template <class A, class = void>
struct Argument {
    static auto read(PyObject* object) { return From<Read<A>>::read(object); }
    template <class V>
    static V& pass(V& value) {
        return value;
    }
};

template <class T>
struct IsValue : std::is_arithmetic<T> {};
template <>
struct IsValue<std::string> : std::true_type {};
template <class T>
struct IsValue<std::vector<T>> : std::true_type {};
template <class T, size_t N>
struct IsValue<std::array<T, N>> : std::true_type {};
template <class... T>
struct IsValue<std::tuple<T...>> : std::true_type {};
template <class T>
struct IsValue<std::map<std::string, T>> : std::true_type {};

template <class A>
struct Argument<A, std::enable_if_t<std::is_class_v<Read<A>> && !IsValue<Read<A>>::value>> {
    static const Read<A>* read(PyObject* object) { return value_in<Read<A>>(object); }
    static const Read<A>& pass(const Read<A>* value) { return *value; }
};

template <bool kRelease, class R, class... A, size_t... I>
PyObject* call(R (*function)(A...), PyObject* const* arguments, std::index_sequence<I...>) {
    auto values = std::make_tuple(Argument<A>::read(arguments[I])...);
    const auto run = [&] {
        std::optional<Released> released;
        if (kRelease) released.emplace();
        return function(Argument<A>::pass(std::get<I>(values))...);
    };
    if constexpr (std::is_void_v<R>) {
        run();
        return Py_NewRef(Py_None);
    } else {
        return to_python(run());
    }
}

inline void check_count(Py_ssize_t found, size_t expected) {
    if (found == static_cast<Py_ssize_t>(expected)) return;
    PyErr_Format(PyExc_TypeError, "got %zd arguments where %zu were expected", found, expected);
    throw Raised();
}

template <auto kFunction, bool kRelease, class R, class... A>
PyObject* fast_call(R (*)(A...), PyObject* const* arguments, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        check_count(count, sizeof...(A));
        return call<kRelease>(kFunction, arguments, std::index_sequence_for<A...>());
    });
}

template <auto kFunction, bool kRelease>
PyObject* entry(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    return fast_call<kFunction, kRelease>(kFunction, arguments, count);
}

inline constexpr bool kWithPython = false;  // of a function that calls Python; others run without the GIL

// A function of the module.
template <auto kFunction, bool kRelease = true>
PyMethodDef function(const char* name) {
    PyObject* (*const address)(PyObject*, PyObject* const*, Py_ssize_t) = &entry<kFunction, kRelease>;
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(address)), METH_FASTCALL, nullptr};
}

// -- types

template <auto kMake, class T, class... A, size_t... I>
PyObject* make(T (*)(A...), PyTypeObject* type, PyObject* arguments, std::index_sequence<I...>) {
    check_count(PyTuple_Size(arguments), sizeof...(A));
    auto values = std::make_tuple(Argument<A>::read(PyTuple_GetItem(arguments, I))...);
    T value = kMake(Argument<A>::pass(std::get<I>(values))...);
    const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
    PyObject* const object = allocate(type, 0);
    if (!object) throw Raised();
    new (&reinterpret_cast<Type<T>*>(object)->value) T(std::move(value));
    return object;
}

template <auto kMake, class T, class... A>
PyObject* make_new(T (*function)(A...), PyTypeObject* type, PyObject* arguments) {
    return guarded([&] { return make<kMake>(function, type, arguments, std::index_sequence_for<A...>()); });
}

template <auto kMake>
PyObject* new_object(PyTypeObject* type, PyObject* arguments, PyObject*) {
    return make_new<kMake>(kMake, type, arguments);
}

template <class T>
void destroy(PyObject* object) {
    PyTypeObject* const type = Py_TYPE(object);
    reinterpret_cast<Type<T>*>(object)->value.~T();
    reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);  // objects own their type
}

template <class T, class... A>
T made_by(T (*)(A...));

// Adds the type of this full name, whose objects hold what kMake makes of the arguments.
template <auto kMake>
void add_type(PyObject* module, const char* full_name) {
    using T = decltype(made_by(kMake));
    PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(&new_object<kMake>)},
                           {Py_tp_dealloc, reinterpret_cast<void*>(&destroy<T>)},
                           {0, nullptr}};
    PyType_Spec spec = {full_name, sizeof(Type<T>), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, slots};
    Owned type(PyType_FromSpec(&spec));
    Type<T>::python = reinterpret_cast<PyTypeObject*>(Py_NewRef(type.get()));  // for as long as the process lives
    if (PyModule_AddObjectRef(module, std::strrchr(full_name, '.') + 1, type.get())) throw Raised();
}

// -- modules

// `functions` must outlive the module.
inline void add_functions(PyObject* module, const std::vector<PyMethodDef>& functions) {
    const Owned name(PyModule_GetNameObject(module));
    for (const PyMethodDef& each : functions) {
        const Owned made(PyCFunction_NewEx(const_cast<PyMethodDef*>(&each), module, name.get()));
        if (PyModule_AddObjectRef(module, each.ml_name, made.get())) throw Raised();
    }
}

// What the initialization of a module returns; fill(module) adds all that is in it.
template <class Fill>
PyObject* make_module(PyModuleDef* definition, Fill fill) {
    return guarded([&]() -> PyObject* {
        const Owned module(PyModule_Create(definition));
        fill(module.get());
        return Py_NewRef(module.get());
    });
}

}  // namespace gptq::python
