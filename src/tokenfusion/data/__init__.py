"""Data: modalities, the on-disk format, joint augmentation, preparations of the official archives."""

from tokenfusion.data.augment import Augment, Batch, Frame, Frames, collate
from tokenfusion.data.folder import IGNORE, Folder
from tokenfusion.data.modality import (
    MODALITIES,
    Modality,
    ModalitySpec,
    normalise,
    prepare_inputs,
    read_image,
    read_inputs,
)

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
    "normalise",
    "prepare_inputs",
    "read_image",
    "read_inputs",
]
