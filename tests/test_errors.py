"""What is told of others' errors."""

from __future__ import annotations

import pytest

from tokenfusion.errors import first_line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one"), "one"),
        (AssertionError(), "AssertionError"),
        (RuntimeError("Error(s) in loading state_dict for Net:\n\tsize mismatch for a"), "size mismatch for a"),
        (ValueError("no more:"), "no more:"),
        (ValueError("a long line that is cut"), "a long line ..."),
    ],
)
def test_first_line(error: Exception, said: str) -> None:
    assert first_line(error, 15) == said if "long" in said else first_line(error) == said
