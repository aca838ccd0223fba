"""The model card of a saved network: facts that the model itself tells."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING

from tokenfusion.backbones.blueprint import NetworkSpec
from tokenfusion.backbones.hub import FusedNetwork
from tokenfusion.components import TARGET

if TYPE_CHECKING:
    from tokenfusion.backbones.saved import SavedConfig


def card(model: FusedNetwork, config: SavedConfig, name: str) -> str:
    """The text of ``README.md``; the licence is the author's to choose."""
    network, fuser = config.network, model.fusers[0] if len(model.fusers) else model.plain
    channels = model.channels or [config.example[1]] * len(model.modalities)
    sizes = dict(zip(model.modalities, channels, strict=True))
    library = {"timm": ["timm"], "hf": ["transformers"], "module": []}[network.kind]
    tags = ["tokenfusion", "multimodal", "vision-transformer", *library, *model.modalities]
    arguments = ", ".join(f"{k} {v}" for k, v in config.fuser.items() if k != TARGET and v is not None)
    says = " ".join(inspect.cleandoc(type(fuser).__doc__ or "").split("\n\n")[0].split())
    shape = ", ".join(map(str, config.example[2:]))
    inputs = ", ".join(f'"{key}": torch.randn(1, {n}, {shape})' for key, n in sizes.items())
    given = f", network={network.name}(...)" if network.kind == "module" else ""
    what = ", ".join(f"{key} ({n} channel{'s' * (n > 1)})" for key, n in sizes.items())
    done = "".join(f"- {line}\n" for line in model.account)
    lines = [
        "---",
        "library_name: tokenfusion",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in dict.fromkeys(tags)),
        "# license: yours to choose; mind that of the weights you started from",
        "---",
        "",
        f"# {name}: {network.name} over {' + '.join(model.modalities)}",
        "",
        f"One network for {len(sizes)} aligned modalities: {what}.",
        f"The base network is {_base(model, network)}; all streams share its weights and each has its own norms.",
        f"{len(model.survey.blocks)} blocks, {sum(p.numel() for p in model.parameters()):,} parameters.",
        *(["", done.rstrip()] if done else []),
        "",
        f"**Exchange.** {type(fuser).__name__}: {says}" + (f" Here: {arguments}." if arguments else ""),
        "",
        "```python",
        "import tokenfusion",
        "import torch",
        "",
        f'model = tokenfusion.load("{name}"{given})  # this folder, or its hub id',
        f"out = model({{{inputs}}})  # a modality may be left out",
        "out.ensemble, out.outputs, out.scores",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _base(model: FusedNetwork, network: NetworkSpec) -> str:
    arguments = ", ".join(f"{k} {v}" for k, v in network.arguments.items()) if network.kind == "timm" else ""
    library = {"timm": "timm's ", "hf": "Hugging Face's ", "module": ""}[network.kind]
    return f"{library}{network.name}" + (f" ({arguments})" if arguments else "")
