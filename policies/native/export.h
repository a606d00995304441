// PERPARAM_EXPORT: a C function that ctypes finds in the library; all others are hidden.

#ifndef PERPARAM_EXPORT_H_
#define PERPARAM_EXPORT_H_

#define PERPARAM_EXPORT extern "C" __attribute__((visibility("default")))

#endif
