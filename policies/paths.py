"""Paths of scales and proxies, which are stored next to their parameter."""

from __future__ import annotations


def is_scale(path: str) -> bool:
    """Returns whether `path` is the path of the scales of a narrow parameter."""
    name = path.rpartition("/")[2]
    return name == "scale_inv" or name.endswith("_scale_inv")


def scale_path(path: str) -> str:
    """Returns the path of the scales of the parameter at `path`.

    >>> scale_path("layers/0/up/kernel"), scale_path("embed/embedding")
    ('layers/0/up/scale_inv', 'embed/embedding_scale_inv')
    """
    parent, slash, name = path.rpartition("/")
    return parent + slash + ("scale_inv" if name == "kernel" else f"{name}_scale_inv")


def proxy_path(path: str) -> str:
    """Returns the path of the proxy of the parameter at `path`; see `perparam.training.add_proxies`.

    >>> proxy_path("layers/0/up/kernel")
    'layers/0/up/kernel_proxy'
    """
    return f"{path}_proxy"
