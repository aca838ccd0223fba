"""Data: modalities, the on-disk format, scenes, joint augmentation, preparations of the official archives."""

from tokenfusion.data.augment import Augment
from tokenfusion.data.cloud import Cloud, read_cloud
from tokenfusion.data.folder import IGNORE, Folder
from tokenfusion.data.frames import Batch, Frame, Frames, collate
from tokenfusion.data.image import measured, read_image, read_inputs, write_image
from tokenfusion.data.inputs import from_tanh, normalise, prepare_inputs, to_tanh
from tokenfusion.data.modality import MODALITIES, Modality, ModalitySpec
from tokenfusion.data.motion import SceneAugment
from tokenfusion.data.picture import picture
from tokenfusion.data.scene import read_boxes, read_camera
from tokenfusion.data.scenes import SceneBatch, Scenes, collate_scenes
from tokenfusion.data.truth import SceneTruth

__all__ = [
    "IGNORE",
    "MODALITIES",
    "Augment",
    "Batch",
    "Cloud",
    "Folder",
    "Frame",
    "Frames",
    "Modality",
    "ModalitySpec",
    "SceneAugment",
    "SceneBatch",
    "SceneTruth",
    "Scenes",
    "collate",
    "collate_scenes",
    "from_tanh",
    "measured",
    "normalise",
    "picture",
    "prepare_inputs",
    "read_boxes",
    "read_camera",
    "read_cloud",
    "read_image",
    "read_inputs",
    "to_tanh",
    "write_image",
]
