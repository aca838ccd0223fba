"""What fused networks of both kinds, one shared or several in lockstep, have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from torch import Tensor, nn

from tokenfusion.errors import UserError
from tokenfusion.fusion.ensemble import LearnedEnsemble
from tokenfusion.fusion.scores import Reduction, sparsity_loss


class FusedOutput(NamedTuple):
    """What a fused network says, per modality that was given.

    ``features``: tokens or maps of its last layer, as the network gives them. ``outputs``: the network's own answer (logits,
    pooled features, a model output of Hugging Face). ``ensemble``: the learned mean of the answers (logits, else
    pooled features, else the first tensor).
    ``donors``: in the shape of ``scores``, the score of what would stand in for each token, -1 where nothing would; None
    where the streams share their blocks, and the donors' scores are other rows of ``scores``.
    """

    features: dict[str, Any]
    outputs: dict[str, Any]
    ensemble: Tensor | None  # [B, ...]; None where separate networks answer in different shapes
    scores: list[Tensor]  # per fused block [M, B, N]; empty where the fuser does not score
    present: Tensor | None  # bool [M, B], None where every modality is there
    donors: list[Tensor] | None = None


class FusedModel(nn.Module):
    """What fused networks of both kinds do: remember the scores for the penalty, recompute blocks, be saved."""

    def __init__(self, modalities: tuple[str, ...]) -> None:
        super().__init__()
        self.modalities = modalities
        self.recomputes = False
        self.ensemble = LearnedEnsemble(len(modalities))
        self.account: list[str] = []  # what was done to the networks, in sentences
        self.recipe: dict[str, Any] = {}  # what a saved one is built from
        self._scores: list[Tensor] | None = None
        self._switches: list[tuple[nn.Module, str]] = []  # of the networks' own gradient checkpointing

    def take_over_checkpointing(self, network: nn.Module) -> None:
        """Where a network's own gradient checkpointing is on, switch it off and recompute blocks here: it cannot see fusers."""
        switches = switches_of(network)
        self._switches += switches
        if any(getattr(module, name) for module, name in switches):
            for module, name in switches:
                setattr(module, name, False)
            self.recomputes = True
            self.account.append("gradient checkpointing was on: the fused blocks are recomputed whole in its place")

    def check_checkpointing(self) -> None:
        """Raise a UserError where someone switched a network's own gradient checkpointing on since then."""
        if self.training and any(getattr(module, name) for module, name in self._switches):
            raise UserError(
                "the network's own gradient checkpointing is on, which cannot see the fusers; switch it off and call "
                "set_grad_checkpointing() of the fused network"
            )

    def sparsity(self, reduction: Reduction = "mean") -> Tensor:
        """The l1 norm of the scores of the last forward pass in training mode (Eq. 5), to be added to the loss times lambda.

        0 without scores. A forward pass in eval mode forgets them.

        Raises:
            RuntimeError: where there was no forward pass in training mode.
        """
        if self._scores is None:
            raise RuntimeError("sparsity() wants a forward pass in training mode first")
        return sparsity_loss(self._scores, reduction).to(next(self.ensemble.parameters()).device)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass, to save memory; the network's own switch cannot see the fusers."""
        self.recomputes = enable

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, how to build the networks, checksums and a model card (one that is there stays as it is).

        ``huggingface_hub.upload_folder`` brings the folder to the hub. Networks of timm and of Hugging Face are built anew from
        their name and arguments; that is tried out here, and where the copy would answer differently, a warning says that
        loading needs ``network=``.

        Raises:
            UserError: where the fuser has no name to write down, a projection is a function, or the folder cannot be written.
        """
        from tokenfusion.backbones import saved  # which needs this file

        saved.save(self, folder)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, network: nn.Module | Mapping[str, nn.Module] | None = None, trust: bool = False
    ) -> Self:
        """The fused model of a folder that :meth:`save_pretrained` wrote, or of its hub id, in eval mode.

        Args:
            path: folder or hub id.
            network: a fresh one, as it was given to ``fuse()``, where it cannot be built from its name; of separate networks
                those that cannot, ``{"audio": network}``.
            trust: build fusers outside of tokenfusion.

        Raises:
            UserError: where a file is missing, damaged or of another version, or the network is wanted or does not fit.
        """
        from tokenfusion.backbones import saved

        model = saved.load(path, network, trust)
        if not isinstance(model, cls):
            raise UserError(
                f"{path}: holds a {type(model).__name__}, not a {cls.__name__}; tokenfusion.load() reads both"
            )
        return model

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the last scores out: they belong to a graph."""
        return {**self.__dict__, "_scores": None}


def switches_of(network: nn.Module) -> list[tuple[nn.Module, str]]:
    """Modules that can recompute what they hold, and what they call the switch: timm's and Hugging Face's."""
    names = ("grad_checkpointing", "gradient_checkpointing")
    return [(m, name) for m in network.modules() for name in names if isinstance(getattr(m, name, None), bool)]


def keep_weights(network: nn.Module) -> None:
    """Ask no gradient of a network's weights; the LoRA that peft put into it stays as it is."""
    for name, parameter in network.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad_(False)
