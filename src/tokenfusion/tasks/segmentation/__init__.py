"""RGB-D and other multimodal semantic segmentation."""

from tokenfusion.data.frames import Batch
from tokenfusion.tasks.segmentation.model import FusedSegmenter, SegmentationOutput
from tokenfusion.tasks.segmentation.run import evaluate, load, predict, save, train
from tokenfusion.tasks.segmentation.settings import SegmentationRecipe as Recipe
from tokenfusion.tasks.segmentation.task import COMPONENTS, SegmentationTask, build_model

__all__ = [
    "COMPONENTS",
    "Batch",
    "FusedSegmenter",
    "Recipe",
    "SegmentationOutput",
    "SegmentationTask",
    "build_model",
    "evaluate",
    "load",
    "predict",
    "save",
    "train",
]
