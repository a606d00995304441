"""A module without the marker `optimised` is compiled without LLVM's costly passes, even after one that has it."""

import jax


def test_an_unmarked_module_is_compiled_without_costly_passes():
    assert jax.config.values["jax_disable_most_optimizations"]
