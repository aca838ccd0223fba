"""Data: modalities, the on-disk format, joint augmentation, preparations of the official archives."""

from tokenfusion.data.augment import Augment
from tokenfusion.data.folder import IGNORE, Folder
from tokenfusion.data.frames import Batch, Frame, Frames, collate
from tokenfusion.data.image import measured, read_image, read_inputs, write_image
from tokenfusion.data.inputs import from_tanh, normalise, prepare_inputs, to_tanh
from tokenfusion.data.modality import MODALITIES, Modality, ModalitySpec
from tokenfusion.data.picture import picture

__all__ = [
    "IGNORE",
    "MODALITIES",
    "Augment",
    "Batch",
    "Folder",
    "Frame",
    "Frames",
    "Modality",
    "ModalitySpec",
    "collate",
    "from_tanh",
    "measured",
    "normalise",
    "picture",
    "prepare_inputs",
    "read_image",
    "read_inputs",
    "to_tanh",
    "write_image",
]
