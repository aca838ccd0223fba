"""The model card of a saved model: facts that the model itself tells."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable

from torch import Tensor

from tokenfusion.backbones.blueprint import NetworkSpec
from tokenfusion.backbones.config import SavedConfig, SeparateConfig, SharedConfig, batch_of, index_maps
from tokenfusion.backbones.hub import FusedNetwork
from tokenfusion.backbones.lockstep import FusedStreams
from tokenfusion.components import TARGET, find

LIBRARY = {"timm": "timm's ", "hf": "Hugging Face's ", "module": ""}
SHARES = {
    "default": "all streams share its weights and each has its own norms",
    "shared": "all streams share its weights, norms too",
    "unshared": "each stream has a copy of its own",
}
TAG = {"timm": ["timm"], "hf": ["transformers"], "module": []}


def card(model: FusedNetwork | FusedStreams, config: SharedConfig | SeparateConfig, name: str) -> str:
    """The text of ``README.md``; the licence is the author's to choose."""
    specs = config.networks().values()
    tags = ["tokenfusion", "multimodal", "vision-transformer", *(tag for spec in specs for tag in TAG[spec.kind])]
    if isinstance(model, FusedNetwork) and isinstance(config, SharedConfig):
        facts = _of_one(config, len(model.survey.blocks))
    else:
        facts = _of_several(config)
    lines = [
        "---",
        "library_name: tokenfusion",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in dict.fromkeys([*tags, *model.modalities])),
        "# license: yours to choose; mind that of the weights you started from",
        "---",
        "",
        f"# {name}: {' + '.join(dict.fromkeys(spec.name for spec in specs))} over {' + '.join(model.modalities)}",
        "",
        *facts,
        f"{sum(p.numel() for p in model.parameters()):,} parameters.",
        *_listed(model.account),
        "",
        _exchange(config),
        "",
        "```python",
        "import tokenfusion",
        "import torch",
        "",
        f'model = tokenfusion.load("{name}"{_given(config)})  # this folder, or its hub id',
        f"out = model({{{_inputs(config, batch_of(index_maps(model)))}}})  # a modality may be left out",
        "out.ensemble, out.outputs, out.scores",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _of_one(config: SharedConfig, blocks: int) -> list[str]:
    inputs = config.inputs()
    what = ", ".join(f"{name} ({_taken(x)})" for name, x in inputs.items())
    return [
        f"One network for {len(inputs)} aligned modalities: {what}.",
        f"The base network is {_base(config.network)}; {SHARES[config.sharing]}.",
        f"{blocks} blocks.",
    ]


def _taken(x: Tensor) -> str:
    """What a stream takes: images say their channels, anything else its shape."""
    return f"{x.shape[1]} channel{'s' * (x.shape[1] > 1)}" if x.dim() == 4 else f"input {list(x.shape[1:])}"


def _of_several(config: SharedConfig | SeparateConfig) -> list[str]:
    specs, inputs = config.networks(), config.inputs()
    each = (f"{name}: {_base(spec)}, input {list(inputs[name].shape[1:])}" for name, spec in specs.items())
    return [
        f"{len(specs)} separate networks in lockstep: before every step their streams exchange tokens.",
        *_listed(each),
        "",
    ]


def _listed(lines: Iterable[str]) -> list[str]:
    listed = [f"- {line}" for line in lines]
    return ["", *listed] if listed else []


def _exchange(config: SavedConfig) -> str:
    """What decides, in the words of its class."""
    decides = find(config.fuser[TARGET], "fuser", True)
    says = " ".join(inspect.cleandoc(decides.__doc__ or "").split("\n\n")[0].split())
    arguments = ", ".join(f"{k} {v}" for k, v in config.fuser.items() if k != TARGET and v is not None)
    return f"**Exchange.** {decides.__name__}: {says}" + (f" Here: {arguments}." if arguments else "")


def _given(config: SavedConfig) -> str:
    """What loading wants beside the folder."""
    wanted = {name: f"{spec.name}(...)" for name, spec in config.networks().items() if spec.kind == "module"}
    if not wanted:
        return ""
    by_name = ", ".join(f'"{name}": {made}' for name, made in wanted.items())
    return f", network={wanted['']}" if "" in wanted else f", network={{{by_name}}}"


def _inputs(config: SavedConfig, batch: int) -> str:
    drawn = {}
    for name, x in config.inputs(batch).items():
        shape = ", ".join(map(str, x.shape))
        drawn[name] = f"torch.randn({shape})" if x.is_floating_point() else f"torch.zeros({shape}, dtype=torch.long)"
    return ", ".join(f'"{name}": {text}' for name, text in drawn.items())


def _base(network: NetworkSpec) -> str:
    arguments = ", ".join(f"{k} {v}" for k, v in network.arguments.items()) if network.kind == "timm" else ""
    return f"{LIBRARY[network.kind]}{network.name}" + (f" ({arguments})" if arguments else "")
