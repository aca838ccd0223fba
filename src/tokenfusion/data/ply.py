"""PLY files: the properties of their vertices, in text or binary of either byte order."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

FORMATS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
NAMES = "char uchar short ushort int uint float double int8 uint8 int16 uint16 int32 uint32 float32 float64"
CODES = "i1 u1 i2 u2 i4 u4 f4 f8 i1 u1 i2 u2 i4 u4 f4 f8"
TYPES = dict(zip(NAMES.split(), CODES.split(), strict=True))


class Element(NamedTuple):
    """One kind of thing that the file lists; ``properties`` is None where each has a length of its own (faces)."""

    name: str
    length: int
    properties: dict[str, str] | None


def parse_ply(data: bytes) -> dict[str, np.ndarray]:
    """The vertices: property name -> [P] in the file's own type. What follows them, such as faces, is passed over.

    Errors: ValueError that says what is wrong.
    """
    end = re.search(rb"^end_header[ \t\r]*\n", data, re.MULTILINE)
    if not re.match(rb"ply[ \t\r]*\n", data) or end is None:
        raise ValueError("has no ply header")
    order, elements = _read_header(data[: end.start()].decode("ascii", "replace"))
    names = [element.name for element in elements]
    if "vertex" not in names:
        raise ValueError("lists no vertices")
    before, vertex = elements[: names.index("vertex")], elements[names.index("vertex")]
    if not vertex.properties:
        raise ValueError("its vertices have no properties, or lists among them")
    body = data[end.end() :]
    return _read_text(body, before, vertex) if order == "" else _read_binary(body, order, before, vertex)


def _read_header(text: str) -> tuple[str, list[Element]]:
    """The byte order ("" = text) and the elements in their order."""
    order, elements = None, list[Element]()
    for line in text.splitlines()[1:]:
        match line.split():
            case ["format", kind, _] if kind in FORMATS:
                order = FORMATS[kind]
            case ["element", name, count] if count.isdigit():
                elements.append(Element(name, int(count), {}))
            case ["property", "list", _, _, _] if elements:
                elements[-1] = elements[-1]._replace(properties=None)
            case ["property", kind, name] if elements and kind in TYPES:
                properties = elements[-1].properties
                if properties is not None and name in properties:
                    raise ValueError(f"its header names {name} twice")
                if properties is not None:
                    properties[name] = TYPES[kind]
            case [] | ["comment", *_] | ["obj_info", *_]:
                pass
            case _:
                raise ValueError(f"its header holds {line[:60]!r}")
    if order is None:
        raise ValueError("its header names no format")
    return order, elements


def _read_text(body: bytes, before: list[Element], vertex: Element) -> dict[str, np.ndarray]:
    """One element per line."""
    properties = vertex.properties or {}
    lines = [line for line in body.splitlines() if line.strip()]
    start = sum(element.length for element in before)
    rows = [line.split() for line in lines[start : start + vertex.length]]
    if len(rows) < vertex.length:
        raise ValueError(f"holds {len(rows)} of {vertex.length} vertices")
    if any(len(row) != len(properties) for row in rows):
        raise ValueError(f"a vertex has not {len(properties)} numbers")
    values = np.array(rows, dtype=np.bytes_).astype(np.float64).reshape(len(rows), len(properties))
    return {name: values[:, k].astype(kind) for k, (name, kind) in enumerate(properties.items())}


def _read_binary(body: bytes, order: str, before: list[Element], vertex: Element) -> dict[str, np.ndarray]:
    start = 0
    for element in before:
        if element.properties is None:
            raise ValueError(f"lists {element.name} before its vertices")
        start += element.length * _record(element, order).itemsize
    record = _record(vertex, order)
    if len(body) - start < vertex.length * record.itemsize:
        raise ValueError(f"holds {max(len(body) - start, 0) // record.itemsize} of {vertex.length} vertices")
    rows = np.frombuffer(body, record, vertex.length, start)
    return {name: rows[name] for name in record.names or ()}


def _record(element: Element, order: str) -> np.dtype:
    return np.dtype([(name, order + kind) for name, kind in (element.properties or {}).items()])
