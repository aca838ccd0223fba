"""Predictions on one's own files, whatever the task: what is read, and that all of a call's files are written, or none."""

from __future__ import annotations

import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from torch import Tensor

from tokenfusion.backbones.dense import FusedPyramid
from tokenfusion.data.folder import Folder
from tokenfusion.data.image import read_inputs
from tokenfusion.data.modality import ModalitySpec
from tokenfusion.errors import UserError, nearest

Specs = Mapping[str, ModalitySpec]
EXAMPLE = "rgb=a.jpg depth=a.png"  # of single files


class Predicts(ABC):
    """Predicts on single files or on a data set folder, and writes all of a call's files or none."""

    example = EXAMPLE

    @abstractmethod
    def files(self, files: Mapping[str, Path], out: Path) -> list[Path]:
        """Predict on one thing given by its files; returns the written ones."""

    @abstractmethod
    def folder(self, folder: Folder, split: str | None, out: Path) -> list[Path]:
        """Predict on a split of a data set folder, or on all of its ids; returns the written files."""

    def run(
        self, files: Mapping[str, str | Path] | None, data: str | Path | None, split: str | None, out: Path
    ) -> list[Path]:
        """Predict on single files or on a data set folder; returns the written files.

        Raises:
            UserError: where it is not exactly one of the two.
        """
        if (files is None) == (data is None):
            raise UserError(f"predict wants either files ({self.example}) or --data FOLDER")
        if files is not None:
            if split is not None:
                raise UserError("--split belongs to --data; single files have none")
            return self.files({name: Path(path) for name, path in files.items()}, out)
        assert data is not None
        return self.folder(Folder(data), split, out)


class Predictor(Predicts):
    """Reads aligned images and lets a task predict on them.

    Args:
        modalities: the model's streams, in order.
        specs: how their files are read.
    """

    def __init__(self, modalities: Sequence[str], specs: Specs) -> None:
        self.modalities, self.specs = tuple(modalities), specs

    @abstractmethod
    def one(self, name: str, source: Path, raw: dict[str, Tensor], specs: dict[str, ModalitySpec], out: Path) -> None:
        """Predict on one image and write its files below ``out`` under ``name``; ``source`` is named in errors."""

    def files(self, files: Mapping[str, Path], out: Path) -> list[Path]:
        """Predict on one image given as a file per modality; modalities may be left out. The whole image is used."""
        for name in files:
            if name not in self.modalities:
                raise UserError(f"{name}=...: this run has no such modality; {nearest(name, self.modalities)}")
        specs = {name: self.specs[name] for name in self.modalities if name in files}
        raw = read_inputs({name: files[name] for name in specs}, specs)
        first = next(iter(files.values()))
        with staged(out, set(files.values())) as (stage, written):
            self.one(first.stem, first, raw, specs, stage)
        return written

    def folder(self, folder: Folder, split: str | None, out: Path) -> list[Path]:
        """Predict on a split of a data set folder, or on all of its ids, within the data set's crop."""
        splits = [split] if split else list(folder.spec.splits)
        ids = list(dict.fromkeys(name for s in splits for name in folder.ids(s)))
        names = [name for name in self.modalities if name in folder.modalities]
        if not names:
            raise UserError(f"{folder.file}: has none of the run's modalities {', '.join(self.modalities)}")
        specs = folder.select(names)
        missing = sorted(path for i in ids for n in names if not (path := folder.image_path(i, n)).is_file())
        if missing:
            more = f", and {len(missing) - 1} more are missing" if missing[1:] else ""
            raise UserError(f"{missing[0]}: no such file{more}")
        sources = {
            folder.image_path(i, n) for i in ids for n in folder.modalities
        }  # the truth, too, is not written over
        if folder.has_target:
            sources |= {folder.target_path(i) for i in ids}
        with staged(out, sources) as (stage, written):
            for i in ids:
                self.one(i, folder.image_path(i, names[0]), folder.read(i, names), specs, stage)
        return written


def new_files(out: Path, name: str, *ends: str) -> list[Path]:
    """The paths ``out/name + end``, their folder made.

    Raises:
        UserError: where one of them is there already.
    """
    paths = [out / f"{name}{end}" for end in ends]
    if any(path.exists() for path in paths):
        raise UserError(f"{name}: two ids of this data set would write the same file; rename one")
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    return paths


def save_scores(path: Path, backbone: FusedPyramid, scores: Sequence[Tensor], size: Sequence[int]) -> None:
    """Every token's score on one image, with the names of the streams and the threshold; nothing where none was scored."""
    maps = score_arrays(backbone, scores, size)
    if maps:
        threshold = np.float32(backbone.threshold or 0.0)
        save_npz(path, {"modalities": np.array(backbone.modalities), "threshold": threshold, **maps})


def score_arrays(backbone: FusedPyramid, scores: Sequence[Tensor], size: Sequence[int]) -> dict[str, np.ndarray]:
    """Scores of one image as maps: ``{block name: float32 [M, h, w]}``; ``size`` is the network's input (rows, columns)."""
    return {name: x[:, 0].float().cpu().numpy() for name, x in backbone.score_maps(scores, size).items()}


def save_npz(path: Path, arrays: Mapping[str, np.ndarray | np.generic]) -> None:
    """Compressed, under exactly this name, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    temporary.replace(path)


@contextmanager
def staged(out: Path, sources: set[Path]) -> Iterator[tuple[Path, list[Path]]]:
    """A hidden folder to write to, and the list that the final paths are put in when everything is there.

    Raises:
        UserError: where ``out`` cannot be written, or a result would take the place of an input.
    """
    written: list[Path] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".partial-", dir=out))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    try:
        yield stage, written
        inputs = {path.resolve() for path in sources}
        moves = {path: out / path.relative_to(stage) for path in sorted(stage.rglob("*")) if path.is_file()}
        for final in moves.values():
            if final.resolve() in inputs:
                raise UserError(f"{final}: is one of the inputs; choose another --out")
        for path, final in moves.items():
            final.parent.mkdir(parents=True, exist_ok=True)
            path.replace(final)
            written.append(final)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if not written:
            with suppress(OSError):
                out.rmdir()  # nothing came of it
