"""3D object detection from point clouds and images."""

from tokenfusion.components import EXCHANGES as FUSERS
from tokenfusion.data.scenes import SceneBatch
from tokenfusion.tasks.detection3d.model import DetectionOutput, FusedDetector
from tokenfusion.tasks.detection3d.predict import EXAMPLE
from tokenfusion.tasks.detection3d.run import judge, modalities_of, model_of, predictor, train
from tokenfusion.tasks.detection3d.settings import DetectionRecipe as Recipe
from tokenfusion.tasks.detection3d.task import COMPONENTS, DetectionTask, build_model

__all__ = [
    "COMPONENTS",
    "EXAMPLE",
    "FUSERS",
    "DetectionOutput",
    "DetectionTask",
    "FusedDetector",
    "Recipe",
    "SceneBatch",
    "build_model",
    "judge",
    "modalities_of",
    "model_of",
    "predictor",
    "train",
]
