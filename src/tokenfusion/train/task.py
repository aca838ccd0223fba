"""What the loop knows of a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from tokenfusion.train.engine import Engine


class ParameterGroup(NamedTuple):
    """Parameters of one role, told by the task and never by a parameter's name.

    ``lr_scale`` multiplies the learning rate; ``weight_decay`` is a factor of the settings' weight decay (True = 1).
    """

    role: str
    params: Iterable[nn.Parameter]
    lr_scale: float = 1.0
    weight_decay: bool | float = True


NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def by_decay(role: str, module: nn.Module, lr_scale: float = 1.0, decay_norms: bool = False) -> list[ParameterGroup]:
    """What of a part is trained: its norm layers do not decay unless asked for."""
    norms = [p for m in module.modules() if _is_norm(m) for p in m.parameters(recurse=False) if p.requires_grad]
    known = {id(p) for p in norms}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in known]
    groups = [ParameterGroup(role, rest, lr_scale, True), ParameterGroup(f"{role} norms", norms, lr_scale, decay_norms)]
    return [group for group in groups if group.params]


def _is_norm(module: nn.Module) -> bool:
    """By its class, or by what that is called (networks bring their own ``RmsNorm``) and one number per channel."""
    own = list(module.parameters(recurse=False))
    return isinstance(module, NORMS) or ("norm" in type(module).__name__.lower() and all(p.dim() == 1 for p in own))


def without_decay(role: str, module: nn.Module | None, lr_scale: float = 1.0) -> list[ParameterGroup]:
    """What of a part is trained, none of it decaying."""
    params = [] if module is None else [p for p in module.parameters() if p.requires_grad]
    return [ParameterGroup(role, params, lr_scale, False)] if params else []


class Task(nn.Module):
    """A task holds its networks and says how they are judged; the loop does the rest.

    In every step the loop calls ``forward`` once and then, for each phase in turn, ``losses``, backward and the phase's
    own optimiser. While a phase is at work the parameters of the other phases ask for no gradient. Checkpoints hold
    ``task.state_dict()``, with its names: a network kept as ``task.model`` is found under ``model.``.

    Several devices: each sees its share of the batch, and gradients are averaged. The result does not depend on the
    number of devices where a loss is a mean over equal shares; a mean over what happens to be labelled does, slightly.

    A part that stays in eval mode (a frozen batch norm) is the task's own to keep: override ``train(mode)``.
    """

    phases: tuple[str, ...] = ("model",)
    monitor: str = ""  # the validation figure that picks the best checkpoint, for example "ensemble/miou"
    higher_is_better: bool = True

    def begin(self, step: int) -> None:
        """Called before every training step (counted from 0): for losses that come or go."""

    def forward(self, batch: Any) -> Any:
        """The outputs for a batch; once per step, under the precision of the run."""
        raise NotImplementedError

    def losses(self, batch: Any, outputs: Any, phase: str) -> dict[str, Tensor]:
        """Named scalar losses of a phase; their sum is minimised.

        A phase that must not reach back detaches ``outputs``. Where a later phase looks through a network that an
        earlier one trains (a discriminator), it runs that network here: its weights have changed since ``forward``.
        """
        raise NotImplementedError

    def parameter_groups(self, phase: str) -> list[ParameterGroup]:
        """What a phase's optimiser trains. Every parameter that asks for a gradient belongs to exactly one group."""
        raise NotImplementedError

    def watch(self, outputs: Any) -> dict[str, Tensor]:
        """Further scalars for the log, as tensors (exchange rates). Asked for only at the steps that are logged."""
        return {}

    def evaluate(self, engine: Engine) -> Mapping[str, float]:
        """Validation figures by flat name, the same in every process; in eval mode and without gradients."""
        return {}
