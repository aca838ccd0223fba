"""Label images, colour overlays and scores for one's own files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from tokenfusion.data.folder import DatasetSpec
from tokenfusion.data.inputs import prepare_inputs
from tokenfusion.data.modality import ModalitySpec
from tokenfusion.data.picture import picture
from tokenfusion.errors import UserError
from tokenfusion.tasks.predictions import Predictor, new_files, save_scores
from tokenfusion.tasks.segmentation.inference import Evaluation, infer
from tokenfusion.tasks.segmentation.model import FusedSegmenter


class SegmentationPredictor(Predictor):
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
        super().__init__(model.modalities, spec.modalities)
        self.model, self.spec, self.protocol, self.resize = model, spec, protocol, resize

    def one(self, name: str, source: Path, raw: dict[str, Tensor], specs: dict[str, ModalitySpec], out: Path) -> None:
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
        plain, coloured, scored = new_files(out, name, ".png", "_overlay.png", "_scores.npz")
        Image.fromarray(labels).save(plain)
        Image.fromarray(overlay.round().astype(np.uint8)).save(coloured)
        save_scores(scored, self.model.backbone, seen.scores, (rows, columns))
