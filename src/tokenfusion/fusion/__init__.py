"""The paper: scores, substitution, allocation, alignment, ensemble, and the fusers made of them. Knows no task, no backbone."""

from tokenfusion.fusion.alignment import LearnedPosition
from tokenfusion.fusion.allocation import partners
from tokenfusion.fusion.baselines import Average, Concat, Random
from tokenfusion.fusion.ensemble import LearnedEnsemble
from tokenfusion.fusion.exchange import ExchangeRates, exchange_rates, substitute
from tokenfusion.fusion.fusers import Context, Fuser, NoFusion, TokenFusion
from tokenfusion.fusion.modality import PerModality, make_private, merge, split
from tokenfusion.fusion.scores import ScorePredictor, sparsity_loss

__all__ = [
    "Average",
    "Concat",
    "Context",
    "ExchangeRates",
    "Fuser",
    "LearnedEnsemble",
    "LearnedPosition",
    "NoFusion",
    "PerModality",
    "Random",
    "ScorePredictor",
    "TokenFusion",
    "exchange_rates",
    "make_private",
    "merge",
    "partners",
    "sparsity_loss",
    "split",
    "substitute",
]
