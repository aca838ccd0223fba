"""Preparations: one file per official archive, each with ``prepare(source, out, ...) -> dict`` of counts."""
