// The version of XLA's FFI for which the handlers of this library are compiled; library.py compares it with jaxlib's.

#include "export.h"
#include <xla/ffi/api/c_api.h>

PERPARAM_EXPORT int perparam_ffi_api_major() { return XLA_FFI_API_MAJOR; }
PERPARAM_EXPORT int perparam_ffi_api_minor() { return XLA_FFI_API_MINOR; }
