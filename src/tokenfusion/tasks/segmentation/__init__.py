"""RGB-D and other multimodal semantic segmentation."""

from tokenfusion.data.frames import Batch
from tokenfusion.tasks.predictions import EXAMPLE
from tokenfusion.tasks.segmentation.model import FusedSegmenter, SegmentationOutput
from tokenfusion.tasks.segmentation.run import judge, modalities_of, model_of, predictor, train
from tokenfusion.tasks.segmentation.settings import SegmentationRecipe as Recipe
from tokenfusion.tasks.segmentation.task import COMPONENTS, SegmentationTask, build_model

__all__ = [
    "COMPONENTS",
    "EXAMPLE",
    "Batch",
    "FusedSegmenter",
    "Recipe",
    "SegmentationOutput",
    "SegmentationTask",
    "build_model",
    "judge",
    "modalities_of",
    "model_of",
    "predictor",
    "train",
]
