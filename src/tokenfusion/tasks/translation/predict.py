"""Generated images for one's own files, and the pictures of a run that the report shows."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor

from tokenfusion.data.folder import DatasetSpec
from tokenfusion.data.frames import Frame, Frames
from tokenfusion.data.image import write_image
from tokenfusion.data.inputs import from_tanh, prepare_inputs
from tokenfusion.data.modality import ModalitySpec
from tokenfusion.data.picture import picture
from tokenfusion.errors import UserError
from tokenfusion.tasks.predictions import Predictor, new_files, save_scores
from tokenfusion.tasks.samples import Seen
from tokenfusion.tasks.samples import write_samples as write
from tokenfusion.tasks.translation.inference import infer
from tokenfusion.tasks.translation.model import FusedTranslator


class TranslationPredictor(Predictor):
    """Writes ``ID.png`` (the ensemble's image in the target's own encoding), ``ID_view.png`` for people, and ``ID_scores.npz``.

    Args:
        model: in eval mode.
        spec: the data set description that the run was trained with: how files are read and written.
        target: the modality that is generated.
        resize: (rows, columns) of inputs and image, None = as the files are.
    """

    def __init__(self, model: FusedTranslator, spec: DatasetSpec, target: str, resize: tuple[int, int] | None) -> None:
        super().__init__(model.modalities, spec.modalities)
        self.model, self.target, self.resize = model, spec.modalities[target], resize

    def one(self, name: str, source: Path, raw: dict[str, Tensor], specs: dict[str, ModalitySpec], out: Path) -> None:
        inputs = prepare_inputs(raw, specs, self.resize, as_tanh=True)
        device = next(self.model.parameters()).device
        try:
            seen = infer(self.model, {n: x.to(device) for n, x in inputs.items()})
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        image = from_tanh(seen.images["ensemble"].cpu(), self.target)
        plain, view, scored = new_files(out, name, ".png", "_view.png", "_scores.npz")
        write_image(plain, image, self.target)
        if self.target.kind != "rgb":
            Image.fromarray(picture(image, self.target)).save(view)
        save_scores(scored, self.model.backbone, seen.scores, image.shape[-2:])


def write_samples(model: FusedTranslator, frames: Frames, out: Path) -> None:
    """Write some frames of a split to ``out``: every branch's image and the ensemble's beside the truth, in one scale."""
    spec = frames.specs[frames.target or ""]

    def see(frame: Frame, inputs: dict[str, Tensor]) -> Seen:
        seen = infer(model, inputs)
        assert frame.target is not None, "a frame of translation has a target"
        truth = from_tanh(frame.target, spec)
        shown = {"target": picture(truth, spec)}
        for name, image in seen.images.items():
            shown[f"prediction/{name}"] = picture(from_tanh(image.cpu(), spec), spec, like=truth)
        return shown, seen.scores

    write(model, model.backbone, frames, see, out, {"task": "translation", "target": frames.target})
