"""Label images, colour overlays and scores for one's own files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from tokenfusion.data.folder import DatasetSpec, Folder
from tokenfusion.data.modality import ModalitySpec, picture, prepare_inputs, read_inputs
from tokenfusion.errors import UserError, nearest
from tokenfusion.tasks.segmentation.inference import Evaluation, infer
from tokenfusion.tasks.segmentation.model import FusedSegmenter
from tokenfusion.tasks.segmentation.samples import save_npz, score_maps


class Predictor:
    """Writes ``ID.png`` (class ids), ``ID_overlay.png`` and ``ID_scores.npz`` per image: all of a call's files, or none.

    Args:
        model: in eval mode.
        spec: the data set description that the run was trained with: how files are read, classes, colours.
        protocol: as in evaluation.
        resize: (rows, columns) of the network's inputs, None = as they are. Predictions always have the image's size.
    """

    def __init__(
        self, model: FusedSegmenter, spec: DatasetSpec, protocol: Evaluation, resize: tuple[int, int] | None
    ) -> None:
        self.model, self.spec, self.protocol, self.resize = model, spec, protocol, resize

    def files(self, files: Mapping[str, Path], out: Path) -> list[Path]:
        """Predict on one image given as a file per modality; modalities may be left out. The whole image is used."""
        for name in files:
            if name not in self.model.modalities:
                raise UserError(f"{name}=...: this run has no such modality; {nearest(name, self.model.modalities)}")
        specs = {name: self.spec.modalities[name] for name in self.model.modalities if name in files}
        raw = read_inputs({name: files[name] for name in specs}, specs)
        first = next(iter(files.values()))
        with _staged(out, set(files.values())) as (stage, written):
            self._one(first.stem, first, raw, specs, stage)
        return written

    def folder(self, folder: Folder, split: str | None, out: Path) -> list[Path]:
        """Predict on a split of a data set folder, or on all of its ids, within the data set's crop."""
        splits = [split] if split else list(folder.spec.splits)
        ids = list(dict.fromkeys(name for s in splits for name in folder.ids(s)))
        names = [name for name in self.model.modalities if name in folder.modalities]
        if not names:
            raise UserError(f"{folder.file}: has none of the run's modalities {', '.join(self.model.modalities)}")
        specs = folder.select(names)
        sources = {folder.image_path(i, n) for i in ids for n in names}
        missing = sorted(path for path in sources if not path.is_file())
        if missing:
            raise UserError(f"{missing[0]}: no such file, and {len(missing) - 1} more are missing")
        if folder.has_target:
            sources |= {folder.target_path(i) for i in ids}
        with _staged(out, sources) as (stage, written):
            for i in ids:
                self._one(i, folder.image_path(i, names[0]), folder.read(i, names), specs, stage)
        return written

    def _one(self, name: str, source: Path, raw: dict[str, Tensor], specs: dict[str, ModalitySpec], out: Path) -> None:
        size = next(iter(raw.values())).shape[-2:]
        inputs = prepare_inputs(raw, specs, self.resize)
        rows, columns = next(iter(inputs.values())).shape[-2:]
        device = next(self.model.parameters()).device
        try:
            seen = infer(self.model, {n: x.to(device) for n, x in inputs.items()}, size, self.protocol)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        labels = seen.predictions["ensemble"].cpu().numpy().astype(np.uint8)
        shown = next((n for n, spec in specs.items() if spec.kind == "rgb"), next(iter(raw)))
        overlay = 0.45 * picture(raw[shown], specs[shown]) + 0.55 * self.spec.palette[labels]
        plain, coloured, scored = (out / f"{name}{end}" for end in (".png", "_overlay.png", "_scores.npz"))
        if any(path.exists() for path in (plain, coloured, scored)):
            raise UserError(f"{name}: two ids of this data set would write the same file; rename one")
        plain.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels).save(plain)
        Image.fromarray(overlay.round().astype(np.uint8)).save(coloured)
        scores = score_maps(self.model.backbone, seen.scores, (rows, columns))
        if scores:
            threshold = np.float32(self.model.backbone.threshold or 0.0)
            save_npz(scored, {"modalities": np.array(self.model.modalities), "threshold": threshold, **scores})


@contextmanager
def _staged(out: Path, sources: set[Path]) -> Iterator[tuple[Path, list[Path]]]:
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
