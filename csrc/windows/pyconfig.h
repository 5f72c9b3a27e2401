// CPython's configuration for Windows of 64 bits, in place of the building Python's own, whose headers are otherwise
// used: as much as its stable ABI needs.
#pragma once

#define Py_PYCONFIG_H  // leaves out the other one

#define MS_WINDOWS
#define MS_WIN64
#define Py_ENABLE_SHARED  // python3.dll has what the extension takes
#define HAVE_DECLSPEC_DLL

#define SIZEOF_SHORT 2
#define SIZEOF_INT 4
#define SIZEOF_LONG 4
#define SIZEOF_LONG_LONG 8
#define SIZEOF_VOID_P 8
#define SIZEOF_SIZE_T 8
#define SIZEOF_WCHAR_T 2
#define SIZEOF_TIME_T 8
#define SIZEOF_OFF_T 4
#define HAVE_LONG_LONG 1
#define HAVE_STDINT_H 1
#define HAVE_STDDEF_H 1
#define HAVE_SYS_TYPES_H 1
#define HAVE_SYS_STAT_H 1
#define HAVE_ERRNO_H 1
