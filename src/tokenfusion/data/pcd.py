"""PCD files of the Point Cloud Library: the fields of their points, in text or binary."""

from __future__ import annotations

import re

import numpy as np

KINDS = {"F": "f", "U": "u", "I": "i"}
PACKED = ("rgb", "rgba")  # three bytes of colour in one 32-bit number, whatever its type says


def parse_pcd(data: bytes) -> dict[str, np.ndarray]:
    """Field name -> [P] in the file's own type; a packed colour becomes the fields r, g and b (uint8).

    Errors: ValueError that says what is wrong.
    """
    end = re.search(rb"^DATA[ \t]+(\w+)[ \t\r]*\n", data, re.MULTILINE)
    if end is None:
        raise ValueError("has no pcd header with DATA at its end")
    header = _read_header(data[: end.start()].decode("ascii", "replace"))
    record, count = _layout(header)
    form, body = end[1].decode("ascii"), data[end.end() :]
    if form == "ascii":
        rows = _read_text(body, record, count)
    elif form == "binary":
        if len(body) < count * record.itemsize:
            raise ValueError(f"holds {len(body) // record.itemsize} of {count} points")
        rows = np.frombuffer(body, record, count)
    else:
        raise ValueError(f"its data are {form}; save it as ascii or binary")
    return _unpack({name: rows[name] for name in record.names or ()})


def _read_header(text: str) -> dict[str, list[str]]:
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {words[0]: words[1:] for words in lines}


def _layout(header: dict[str, list[str]]) -> tuple[np.dtype, int]:
    """How one point is stored, and how many there are."""
    try:
        names = header["FIELDS"]
        counts = header.get("COUNT", ["1"] * len(names))
        fields = list(zip(names, header["SIZE"], header["TYPE"], counts, strict=True))
        total = int(header["POINTS"][0]) if "POINTS" in header else int(header["WIDTH"][0]) * int(header["HEIGHT"][0])
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"its header lacks or garbles {error}") from None
    layout: list[tuple[str, str, tuple[int, ...]]] = []
    for index, (name, size, kind, repeats) in enumerate(fields):
        if kind not in KINDS or size not in ("1", "2", "4", "8") or not repeats.isdigit():
            raise ValueError(f"its field {name} has type {kind}, size {size} and count {repeats}")
        unique = f"{name} {index}" if name == "_" else name  # padding
        layout.append((unique, f"<{KINDS[kind]}{size}", () if repeats == "1" else (int(repeats),)))
    if total < 0 or not layout:
        raise ValueError(f"its header names {len(layout)} fields and {total} points")
    return np.dtype(layout), total


def _read_text(body: bytes, record: np.dtype, count: int) -> np.ndarray:
    """One point per line."""
    lines = [line.split() for line in body.splitlines() if line.strip()][:count]
    names = record.names or ()
    widths = [int(np.prod(record[name].shape)) for name in names]
    if len(lines) < count:
        raise ValueError(f"holds {len(lines)} of {count} points")
    if any(len(line) != sum(widths) for line in lines):
        raise ValueError(f"a point has not {sum(widths)} numbers")
    values = np.array(lines, dtype=np.bytes_).astype(np.float64).reshape(count, sum(widths))
    rows = np.zeros(count, record)
    for name, width, start in zip(names, widths, np.cumsum([0, *widths[:-1]]), strict=True):
        with np.errstate(invalid="ignore"):  # NaN among whole numbers
            rows[name] = values[:, start : start + width].reshape(rows[name].shape)
    return rows


def _unpack(fields: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for name in PACKED:
        if name in fields:
            if fields[name].dtype.itemsize != 4 or fields[name].ndim != 1:
                raise ValueError(f"its field {name} is not one number of 32 bits")
            bits = np.ascontiguousarray(fields.pop(name)).view(np.uint32)
            fields |= {key: (bits >> shift & 255).astype(np.uint8) for key, shift in (("r", 16), ("g", 8), ("b", 0))}
    return fields
