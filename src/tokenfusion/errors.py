"""The one exception that a user's mistake raises, what other errors say, and the door to optional libraries."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class UserError(ValueError):
    """A mistake that the user can mend: one line that says what came, what is wanted and what to do.

    The command line prints it without a traceback and ends with exit code 2.
    """


def require(module: str, extra: str) -> ModuleType:
    """Import an optional library, or say which pip extra brings it.

    Args:
        module: dotted module name, for example ``"h5py"``.
        extra: the extra of this package that installs it, for example ``"prepare"``.

    Raises:
        UserError: where the library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        library = module.split(".")[0]
        if error.name is None or error.name.split(".")[0] != library:
            raise  # the library is there, but something that it needs is not: that is not the user's mistake
        raise UserError(f"this needs {library}, which is not installed: pip install 'tokenfusion[{extra}]'") from None


def first_line(error: BaseException, most: int = 160) -> str:
    """The first line of what an error says, of a heading the second, cut off behind a word; its class where it says nothing."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    line = lines[1] if lines[0].endswith(":") and lines[1:] else lines[0]
    return line if len(line) <= most else line[:most].rpartition(" ")[0] + " ..."


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the known word closest to ``word``, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
