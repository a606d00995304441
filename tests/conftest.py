"""What all tests share: strict promotion, so that every cast in perparam is meant; quick compilation; hypothesis."""

import hypothesis
import jax
import pytest

try:  # private, and so perhaps somewhere else in the next version: without it, tests take longer
    from jax._src import compiler

    _compile_options = compiler.get_compile_options
except (ImportError, AttributeError):
    compiler = None

jax.config.update("jax_numpy_dtype_promotion", "strict")

# Compilation dominates, and differs by seconds between machines: no deadline.
hypothesis.settings.register_profile("default", deadline=None, max_examples=12, derandomize=True, database=None)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=300)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation(request):
    """Without LLVM's costly passes, and with XLA's older code generator, whose own passes take half of the time.

    Most programs here run once.  XLA's passes over programs, which decide about casts and memory, run all the same.  A
    module that promises bits, or is written for a compiler, says `pytestmark = pytest.mark.optimised` and is compiled
    as it is for users.
    """
    quick = request.node.get_closest_marker("optimised") is None
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", quick)
    with pytest.MonkeyPatch.context() as patch:
        if quick and compiler is not None and jax.__version_info__ < (0, 12):  # which has no older one
            patch.setattr(compiler, "get_compile_options", _with_older_emitters)
        yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()  # no file needs the programs of another, and gigabytes of them slow Python's collector down


def _with_older_emitters(*arguments, **settings):
    options = _compile_options(*arguments, **settings)
    options.env_option_overrides = [*options.env_option_overrides, ("xla_cpu_use_fusion_emitters", False)]
    return options
