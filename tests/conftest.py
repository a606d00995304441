"""What all tests share: strict promotion, so that every cast in perparam is meant; quick compilation; hypothesis."""

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")

# Compilation dominates, and differs by seconds between machines: no deadline.
hypothesis.settings.register_profile("default", deadline=None, max_examples=12, derandomize=True, database=None)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=300)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation(request):
    """Without LLVM's costly passes, which take a quarter of the time: most programs here are run once.

    XLA's own passes over programs, which decide about casts and memory, run all the same. A module that promises bits,
    or is written for a compiler, says `pytestmark = pytest.mark.optimised` and is compiled as it is for users.
    """
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", request.node.get_closest_marker("optimised") is None)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()  # no file needs the programs of another, and gigabytes of them slow Python's collector down
