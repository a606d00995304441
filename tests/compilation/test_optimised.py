"""A module with `pytestmark = pytest.mark.optimised` is compiled as it is for users."""

import jax
import pytest

pytestmark = pytest.mark.optimised


def test_a_marked_module_is_compiled_with_all_optimisations():
    assert not jax.config.values["jax_disable_most_optimizations"]


def test_the_marker_stands_on_whole_modules_alone(request):
    """The fixture that reads it is a module's: on a single test it would change nothing."""
    marked = [item for item in request.session.items if any(mark.name == "optimised" for mark in item.own_markers)]
    assert not [item.nodeid for item in marked]
