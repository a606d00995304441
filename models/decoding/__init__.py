"""One decoding step of a decoder on a Hopper GPU in few launches: the kernels between the matrix products, fused."""
