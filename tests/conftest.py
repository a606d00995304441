"""What all tests share: strict dtype promotion, so that every cast in perparam is meant, and a hypothesis profile."""

import hypothesis
import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")

# Compilation dominates, and differs by seconds between machines: no deadline.
hypothesis.settings.register_profile("default", deadline=None, max_examples=12, derandomize=True, database=None)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=300)
hypothesis.settings.load_profile("default")
