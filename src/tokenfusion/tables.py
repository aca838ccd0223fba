"""Tables for the terminal: lists, figures of runs, figures by class, races."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Column, Table

from tokenfusion.report import metric
from tokenfusion.report.rows import rows_of, shown_by_class


def listed(title: str, entries: Mapping[str, str]) -> Table:
    """Names and what they are."""
    table = Table(
        Column(no_wrap=True),
        Column(),
        title=title,
        title_justify="left",
        show_header=False,
        box=None,
        title_style="bold",
    )
    for name, text in entries.items():
        table.add_row(name, text)
    return table


def figures(metrics: Mapping[str, Any]) -> Table:
    """The content of metrics.json: a row per stream or head, the one that ranks in bold."""
    streams, target = metrics["streams"], f", target {metrics['target']}" if metrics.get("target") else ""
    rows = rows_of(metrics.get("task", ""))
    title = (
        f"{metrics['dataset']} {metrics['split']}, {metrics['images']} {rows.judged}s, step {metrics['step']}{target}"
    )
    columns = metric.names([streams], metrics["primary"])
    first = Column(rows.noun, overflow="fold", min_width=10)
    table = Table(first, *map(metric.heading, columns), title=title, caption=metrics["protocol"])
    for stream, found in streams.items():
        values = [metric.number(found.get(name), name, least=2) for name in columns]
        table.add_row(stream, *values, style="bold" if stream == rows.leader else None)
    return table


def classes(metrics: Mapping[str, Any]) -> Table:
    """The IoU of every stream by class, or all figures of a detector's last head."""
    tables = shown_by_class(metrics.get("task", ""), metrics["per_class"])
    columns = {stream: ("iou", table["iou"]) for stream, table in tables.items() if "iou" in table}
    title = "IoU per class" if columns else f"per class, {' '.join(tables)} head"
    if not columns:
        columns = {metric.heading(kind): (kind, table[kind]) for table in tables.values() for kind in table}
    table = Table("class", *columns, title=title)
    for index, name in enumerate(metrics["classes"]):
        table.add_row(name, *(metric.number(column[index], kind, least=2) for kind, column in columns.values()))
    return table


def race(result: Mapping[str, Any]) -> Table:
    """What ``bench`` measured of each contestant."""
    shown = "x".join(map(str, result["size"]))
    title = f"{result['recipe']} at {shown}, {result['threads']} threads, {result['device']}, torch {result['torch']}"
    table = Table("", "seconds", "fastest", "peak MB", "training peak MB", "million parameters", "GFLOP", title=title)
    for name, row in result["rows"].items():
        cells = [row[key] for key in ("seconds", "fastest", "peak_mb", "training_peak_mb")]
        cells += [row["parameters"] / 1e6, row["gflop"]]
        table.add_row(name, *("" if c is None else f"{c:.{3 if i < 2 else 1}f}" for i, c in enumerate(cells)))
    return table
