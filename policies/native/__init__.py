"""The native kernels for CPUs: their C++ sources, and `library`, which loads what was compiled of them."""
