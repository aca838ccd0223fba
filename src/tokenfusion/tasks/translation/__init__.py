"""Multimodal image-to-image translation."""

from tokenfusion.data.frames import Batch
from tokenfusion.tasks.predictions import EXAMPLE
from tokenfusion.tasks.translation.inference import Evaluation
from tokenfusion.tasks.translation.model import Discriminator, FusedTranslator, TranslationOutput
from tokenfusion.tasks.translation.run import judge, modalities_of, model_of, predictor, train
from tokenfusion.tasks.translation.settings import TranslationRecipe as Recipe
from tokenfusion.tasks.translation.task import COMPONENTS, TranslationTask, build_discriminator, build_model

__all__ = [
    "COMPONENTS",
    "EXAMPLE",
    "Batch",
    "Discriminator",
    "Evaluation",
    "FusedTranslator",
    "Recipe",
    "TranslationOutput",
    "TranslationTask",
    "build_discriminator",
    "build_model",
    "judge",
    "modalities_of",
    "model_of",
    "predictor",
    "train",
]
