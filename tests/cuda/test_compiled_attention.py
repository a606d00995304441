"""cuDNN's attention in whole programs, compiled for an H200."""

import re

import jax
import jax.numpy as jnp
import pytest
import shapes
from flax import nnx

from perparam.policies.matmul import matmul_override

pytestmark = [pytest.mark.cuda, pytest.mark.optimised]


def compiled(tokens: int, slots: int) -> str:
    """The program of a tiny model for `tokens` after others, in a cache of `slots`."""
    import compile_h200  # which changes the environment

    model = shapes.abstract_model(shapes.TINY)
    graph, state = nnx.split(model)
    cache = jax.eval_shape(lambda: model.empty_cache(2, slots))

    def extended(state, ids, cache):
        return nnx.merge(graph, state).hidden(ids, None, cache)

    ids = jax.ShapeDtypeStruct((2, tokens), jnp.int32)
    with matmul_override(target=compile_h200.HOPPER):
        lowered = jax.jit(extended, donate_argnums=2).lower(*compile_h200.abstract((state, ids, cache)))
    return lowered.compile().as_text()


@pytest.mark.parametrize(("tokens", "slots", "calls"), [(128, 512, 1), (4096, 16384, 1), (131, 512, 1), (127, 512, 0)])
def test_tokens_after_a_prefix(tokens, slots, calls):
    found = re.findall(r'custom_call_target="(__cudnn\$\w+)"', compiled(tokens, slots))
    assert found == ["__cudnn$fmhaScaleBiasSoftmax"] * calls
