"""Path patterns, against an independent reference."""

import re
import time
import tracemalloc

import pytest
from helpers import reference_matches
from hypothesis import example, given, settings
from hypothesis import strategies as st

from perparam.policies import InvalidPolicy
from perparam.policies.patterns import Pattern

# Few letters, so that patterns hit: in a draw of 300, four in ten pairs match.
names = st.sampled_from(["a", "b", "ab", "ba", "aab", "q_a", "0", "1.5"])
paths = st.lists(names, min_size=1, max_size=5).map("/".join)
parts = st.one_of(
    names,
    st.sampled_from(
        ["*", "**", "a*", "*b", "*a*", "a*b", "{a,b}", "{a,q_}a", "{a,ab}*", "*{b,}", "{0..2}", "*{b,0..1}"]
    ),
)
patterns = st.lists(parts, min_size=1, max_size=4).map("/".join)


class TestMatching:
    @settings(max_examples=200)
    @given(pattern=patterns, path=paths)
    @example(pattern="**", path="a")
    @example(pattern="**/a", path="a")
    @example(pattern="a/**/b", path="a/b")
    @example(pattern="a/**", path="a")
    @example(pattern="a/**/**/b", path="a/0/1.5/b")
    def test_agrees_with_the_reference(self, pattern, path):
        assert Pattern.of(pattern).matches(path) == reference_matches(pattern, path)

    @settings(max_examples=200)
    @given(pattern=patterns, path=paths)
    def test_agrees_with_the_reference_on_paths_made_to_fit(self, pattern, path):
        filled = pattern.replace("**", path).replace("*", "ab").replace("{a,b}", "b").replace("{a,ab}", "ab")
        assert Pattern.of(pattern).matches(filled) == reference_matches(pattern, filled)

    def test_a_bare_name_matches_the_last_component_at_any_depth(self):
        kernel = Pattern.of("kernel")
        assert kernel.matches("kernel")
        assert kernel.matches("layers/0/kernel")
        assert not kernel.matches("kernel/0")
        assert not kernel.matches("layers/0/kernel_norm")

    def test_a_range_includes_both_ends(self):
        layers = Pattern.of("layers/{0..5,8,10..11}/**")
        assert [i for i in range(13) if layers.matches(f"layers/{i}/kernel")] == [0, 1, 2, 3, 4, 5, 8, 10, 11]
        assert Pattern.of("Dense_{3..3}/kernel").exact == {"Dense_3/kernel"}

    def test_alternatives_of_components_do_not_multiply(self):
        pattern = Pattern.of("layers/{0..125}/**/{q,k,v,o}_proj/kernel")
        assert pattern.matches("layers/125/self_attn/o_proj/kernel")
        assert not pattern.matches("layers/126/self_attn/o_proj/kernel")

    def test_a_dot_is_a_dot(self):
        assert Pattern.of("a.b/c").matches("a.b/c")
        assert not Pattern.of("a.b/c").matches("axb/c")

    def test_any_other_pattern_is_anchored_at_both_ends(self):
        assert not Pattern.of("mlp/kernel").matches("layers/mlp/kernel")
        assert not Pattern.of("layers/mlp").matches("layers/mlp/kernel")

    def test_query_does_not_hit_query_norm(self):
        assert not Pattern.of("**/query/*").matches("layers/0/query_norm/scale")

    def test_many_double_stars_cost_no_more_than_one(self):
        start = time.monotonic()
        assert not Pattern.of("/".join(["**", "a"] * 30 + ["b"])).matches("/".join(["a"] * 60))
        assert time.monotonic() - start < 1  # seconds; two to the thirtieth steps would take hours

    def test_many_stars_in_a_component_do_not_take_exponential_time(self):
        start = time.monotonic()
        assert not Pattern.of("*a" * 9 + "b/kernel").matches("a" * 40 + "/kernel")
        assert (
            time.monotonic() - start < 1
        )  # seconds; a backtracking matcher takes six times longer for every further star, two for these


class TestRefusal:
    @pytest.mark.parametrize("character", list("?[]!()^$|\\,"))
    def test_other_glob_characters_are_refused(self, character):
        with pytest.raises(
            InvalidPolicy, match=re.escape(repr(character)) + " has no meaning in a pattern. Write '\\*'"
        ):
            Pattern.of(f"layers/x{character}y/kernel")

    @pytest.mark.parametrize("expression", ["^layers/.*", r"layers/\d+/kernel", "(q|k)_proj/kernel", "kernel$"])
    def test_a_regular_expression_is_answered_with_globs(self, expression):
        with pytest.raises(InvalidPolicy, match="Patterns are globs, not regular expressions: write '\\*'"):
            Pattern.of(expression)

    @pytest.mark.parametrize("pattern", ["", "/kernel", "kernel/", "a//b", "a/{,b}/c"])
    def test_empty_components_are_refused(self, pattern):
        with pytest.raises(InvalidPolicy, match=r"empty component. Paths look like layers/0/dense"):
            Pattern.of(pattern)

    @pytest.mark.parametrize("pattern", ["a**", "layers/**x/kernel", "***"])
    def test_a_double_star_within_a_component_is_refused(self, pattern):
        with pytest.raises(InvalidPolicy, match=r"'\*\*' must be a whole component. Write 'a/\*\*/b'"):
            Pattern.of(pattern)

    @pytest.mark.parametrize("pattern", ["{a", "a}", "{a,{b,c}}", "{a/b,c}", "}{"])
    def test_unbalanced_and_nested_braces_are_refused(self, pattern):
        with pytest.raises(InvalidPolicy, match="braces do not match"):
            Pattern.of(pattern)

    @pytest.mark.parametrize("range", ["5..0", "00..05", "-1..3", "a..b", "0..", "..", "0...3", "0..1..2", "0..٣"])
    def test_what_is_no_range_is_refused(self, range):
        with pytest.raises(InvalidPolicy, match=r"is not a range of numbers. Write .* as in '{0..5}'"):
            Pattern.of(f"layers/{{{range}}}/kernel")

    @pytest.mark.parametrize("pattern", ["{0..999999999}", "{0..511}/{0..1}", "{0..22}{0..22}", "{0..511,1000}"])
    def test_a_range_is_bounded(self, pattern):
        start = time.monotonic()
        with pytest.raises(InvalidPolicy, match="more than 512 alternatives"):
            Pattern.of(pattern)
        assert time.monotonic() - start < 1

    def test_a_line_of_braces_does_not_become_a_million_patterns(self):
        start = time.monotonic()
        with pytest.raises(InvalidPolicy, match=r"more than 512 alternatives. Write several rules"):
            Pattern.of("{a,b}" * 40)
        assert time.monotonic() - start < 1

    def test_a_pattern_is_a_line_and_not_a_book(self):
        with pytest.raises(
            InvalidPolicy, match=r"the pattern 'aaa.*… .* has 10001 characters, expected at most 500"
        ) as caught:
            Pattern.of("a" * 10_001)
        assert len(str(caught.value)) < 400

    def test_a_component_has_few_stars(self):
        with pytest.raises(InvalidPolicy, match=r"has more than 16 '\*'"):
            Pattern.of("*a" * 17 + "b")
        assert Pattern.of("*a" * 16 + "b").matches("a" * 16 + "b")

    @pytest.mark.parametrize("pattern", ["**/" * 160 + "kernel", "**/*/" * 90 + "kernel"])
    def test_many_wildcards_cost_no_more_than_one(self, pattern):
        start = time.monotonic()
        for i in range(300):
            Pattern.of(pattern).matches(f"layers/{i}/self_attn/q_proj/kernel")
        assert time.monotonic() - start < 1

    def test_a_line_of_commas_does_not_become_a_gigabyte(self):
        tracemalloc.start()
        try:
            with pytest.raises(InvalidPolicy, match="more than 512 alternatives"):
                Pattern.of("x" * 100 + ("{" + "," * 150 + "}") * 2)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 5_000_000  # bytes; the alternatives written out before they are counted take 25 million
