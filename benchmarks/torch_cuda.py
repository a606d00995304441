"""Torch's products on an NVIDIA GPU, for comparison: cuBLAS in bfloat16 and in float8."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import timing

Build = Callable[[], timing.Timed]


def products(rows: int, out_features: int, in_features: int, copies: int) -> list[tuple[str, str | None, Build]]:
    """Returns name, mode and builder of each product; an empty list without torch or without CUDA.

    `_scaled_mm` multiplies float8 operands that are already quantised, with one scale per tensor instead of one per
    block, and sums only in the tensor cores (`use_fast_accum`): this is less work than W8A8.
    """
    try:
        import torch.cuda
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    unit = torch.ones((), device="cuda")

    def plain(x: Any, kernel: Any) -> Any:
        return torch.mm(x, kernel.t())

    def scaled(x: Any, kernel: Any) -> Any:
        return torch._scaled_mm(x, kernel.t(), unit, unit, out_dtype=torch.bfloat16, use_fast_accum=True)

    def build(function: Callable[..., Any], dtype: Any) -> timing.Timed:
        torch.manual_seed(timing.SEED)
        shapes = [(rows, in_features), (out_features, in_features)]
        operands = [
            tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(dtype) for shape in shapes)
            for _ in range(copies)
        ]
        return timed(function, operands, 2 * rows * out_features * in_features)

    return [
        ("torch bf16", None, functools.partial(build, plain, torch.bfloat16)),
        ("torch._scaled_mm, one scale a tensor", "W8A8", functools.partial(build, scaled, torch.float8_e4m3fn)),
    ]


def timed(function: Callable[..., Any], copies: Sequence[tuple], operations: int) -> timing.Timed:
    """Returns `timing.timed` for a torch function: events measure a CUDA graph of the calls on all copies."""
    import torch

    result = function(*copies[0])  # the first call initialises libraries, which a graph cannot capture
    graph, start, end = torch.cuda.CUDAGraph(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.graph(graph):
        for operands in copies:
            function(*operands)

    def sample(count: int) -> float:
        start.record()
        for _ in range(count):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / (count * len(copies))

    sample(2)  # warm
    count = max(1, round(timing.SAMPLE_SECONDS / (sample(1) * len(copies))))
    moved = sum(one.numel() * one.element_size() for one in (*copies[0], result))
    return timing.Timed(functools.partial(sample, count), moved, operations, (f"torch {torch.__version__}",))
