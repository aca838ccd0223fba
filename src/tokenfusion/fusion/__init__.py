"""The paper: scores, substitution, allocation, alignment, ensemble, and the fusers made of them. Knows no task, no backbone."""

from tokenfusion.fusion.alignment import LearnedPosition
from tokenfusion.fusion.allocation import partners
from tokenfusion.fusion.baselines import Average, Concat, Random
from tokenfusion.fusion.bottleneck import Bottleneck
from tokenfusion.fusion.channels import ChannelExchange, TokenChannel, scale_penalty
from tokenfusion.fusion.cross_attention import CrossAttention
from tokenfusion.fusion.ensemble import LearnedEnsemble
from tokenfusion.fusion.exchange import ExchangeRates, exchange_rates, substitute
from tokenfusion.fusion.fusers import Context, Fuser, NoFusion, TokenFusion
from tokenfusion.fusion.gating import Gating
from tokenfusion.fusion.mended import MendedFusion
from tokenfusion.fusion.modality import PerModality, make_private, merge, split
from tokenfusion.fusion.scores import ScorePredictor, sparsity_loss

__all__ = [
    "Average",
    "Bottleneck",
    "ChannelExchange",
    "Concat",
    "Context",
    "CrossAttention",
    "ExchangeRates",
    "Fuser",
    "Gating",
    "LearnedEnsemble",
    "LearnedPosition",
    "MendedFusion",
    "NoFusion",
    "PerModality",
    "Random",
    "ScorePredictor",
    "TokenChannel",
    "TokenFusion",
    "exchange_rates",
    "make_private",
    "merge",
    "partners",
    "scale_penalty",
    "sparsity_loss",
    "split",
    "substitute",
]
