// What this library was compiled from: the version of XLA's FFI, which library.py compares with jaxlib's, and the sources.

#include <xla/ffi/api/c_api.h>

#include "export.h"

PERPARAM_EXPORT int perparam_ffi_api_major() { return XLA_FFI_API_MAJOR; }
PERPARAM_EXPORT int perparam_ffi_api_minor() { return XLA_FFI_API_MINOR; }

// setup.py defines it: a hash of all sources, with which a test finds a library that has to be compiled again.
PERPARAM_EXPORT const char* perparam_sources() { return PERPARAM_SOURCES; }
