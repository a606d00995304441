"""`DEVICES`: peak figures of accelerators, with their sources; the estimates of `roofline.py` follow from them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Device:
    """Peak figures of one accelerator, as its vendor states them; GB and TB are powers of ten.

    name       of the accelerator
    memory     bytes of HBM
    bandwidth  bytes/s between HBM and the processor
    bf16, fp8  dense FLOP/s of matrix products, without structured sparsity; FP8 as BF16 where FP8 is not multiplied
    links      bytes/s that the device can send over all its NVLink or ICI links: half of what vendors state, who add
               both directions
    together   the most devices that these links connect
    source     where the figures are from
    """

    name: str
    memory: float
    bandwidth: float
    bf16: float
    fp8: float
    links: float
    together: int
    source: str


_TPU = "https://cloud.google.com/tpu/docs/"

DEVICES = (
    # NVIDIA states 1,979 and 3,958 TFLOPS "with sparsity", which are twice the dense ones; NVLink 900 GB/s.
    Device(
        "H100 SXM", 80e9, 3.35e12, 989.5e12, 1979e12, 450e9, 8,
        "https://www.nvidia.com/en-us/data-center/h100/, product specifications, half of those with sparsity",
    ),
    Device(
        "H200 SXM", 141e9, 4.8e12, 989.5e12, 1979e12, 450e9, 8,
        "https://www.nvidia.com/en-us/data-center/h200/, specifications, half of those with sparsity",
    ),
    # For eight GPUs: 1,440 GB, 64 TB/s, 72 PFLOPS of FP8 with sparsity, NVLink 14.4 TB/s.
    Device(
        "B200", 180e9, 8e12, 2250e12, 4500e12, 900e9, 8,
        "https://www.nvidia.com/en-us/data-center/dgx-b200/, an eighth of DGX B200, half of that with sparsity",
    ),
    # ICI is stated as 400, 1200 and 800 GB/s in both directions. v5e and v6e multiply int8 at twice the rate, not FP8;
    # for v5p Google states the same 459 TFLOPS for FP8 and BF16.
    Device("TPU v5e", 16e9, 819e9, 197e12, 197e12, 200e9, 256, f"{_TPU}v5e"),
    Device("TPU v5p", 95e9, 2765e9, 459e12, 459e12, 600e9, 8960, f"{_TPU}v5p"),
    Device("TPU v6e", 32e9, 1638e9, 918e12, 918e12, 400e9, 256, f"{_TPU}v6e"),
)  # fmt: skip
"""A ring along one axis of a TPU's torus has only the links of that axis: half of them (v5e, v6e), or a third (v5p)."""
