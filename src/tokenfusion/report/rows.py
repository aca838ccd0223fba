"""What a table of figures has in its rows, by task, and which of them ranks a run."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

T = TypeVar("T")

ENSEMBLE = "ensemble"


class Rows(NamedTuple):
    """What the rows of a task's figures are, which of them ranks a run, and what is judged."""

    noun: str
    leader: str
    judged: str
    leader_name: str  # in a sentence


STREAMS, HEADS = Rows("stream", ENSEMBLE, "image", ENSEMBLE), Rows("head", "last", "scene", "last head")


def shown_by_class(task: str, tables: dict[str, T]) -> dict[str, T]:
    """What is shown by class: all streams, or of a detector's many heads the one that ranks."""
    leader = rows_of(task).leader
    return {leader: tables[leader]} if rows_of(task) is HEADS and leader in tables else tables


def rows_of(task: str) -> Rows:
    """A detector of points has a head behind every layer; other tasks have streams and their ensemble."""
    return HEADS if task == "detection3d" else STREAMS
