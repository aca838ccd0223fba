"""Foreign checkpoints in our format."""

from __future__ import annotations

import os
import re
from pathlib import Path

from safetensors.torch import save_file

from tokenfusion.api import task_package
from tokenfusion.backbones.mit import DEPTHS, WIDTHS, mit
from tokenfusion.backbones.weights import (
    StateDict,
    from_hf_segformer,
    from_released_segmentation,
    from_segformer,
    load_into,
    read_checkpoint,
)
from tokenfusion.data.folder import Folder
from tokenfusion.errors import UserError, nearest
from tokenfusion.recipe import read_recipe, validate

SINGLE_MODAL = {"segformer": from_segformer, "hf-segformer": from_hf_segformer}
KINDS = ("released-segmentation", *SINGLE_MODAL)


def convert(
    file: str | Path,
    kind: str,
    out: str | Path,
    dataset: str | Path | None = None,
    modalities: tuple[str, ...] = ("rgb", "depth"),
) -> str:
    """Write a foreign checkpoint as a run folder (fused) or as ``model.safetensors`` (single-modal).

    Args:
        file: ``.pth``, ``.pth.tar``, ``.bin``, ``.safetensors`` or a folder that holds one.
        kind: ``released-segmentation``, ``segformer`` (original mit_b*.pth) or ``hf-segformer``.
        out: new folder. A run folder goes to ``eval``, ``predict`` and :func:`tokenfusion.load`; single-modal weights are
            what a recipe's ``model.weights`` names.
        dataset: for fused checkpoints: a data set folder or dataset.yaml that says how files are read and names the classes.
        modalities: names of the streams, in the file's order.

    Returns:
        a few printable lines: what was found and written.
    """
    if kind not in KINDS:
        raise UserError(f"--from {kind}: unknown kind of checkpoint; {nearest(kind, KINDS)}")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty, or is no folder; choose a new one")
    source = read_checkpoint(file)
    if kind in SINGLE_MODAL:
        return _single(SINGLE_MODAL[kind](source), str(file), out)
    try:
        tensors = from_released_segmentation(source)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return _released(tensors, str(file), out, dataset, tuple(name.strip() for name in modalities))


def _variant(depths: list[int], width: int, file: str) -> str:
    for variant, known in DEPTHS.items():
        if list(known) == depths and WIDTHS.get(variant, (64,))[0] == width:
            return variant
    raise UserError(f"{file}: depths {depths} at width {width} are none of MiT-B0 to B5")


def _depths(tensors: StateDict) -> list[int]:
    found = [re.search(r"stages\.(\d)\.blocks\.(\d+)\.", key) for key in tensors]
    blocks = {(int(m.group(1)), int(m.group(2))) for m in found if m}
    return [1 + max((b for s, b in blocks if s == stage), default=-1) for stage in range(4)]


def _single(tensors: StateDict, file: str, out: Path) -> str:
    name = "stages.0.embed.proj.weight"
    if name not in tensors:
        raise UserError(f"{file}: holds no MiT in the layout asked for; its first key is {next(iter(tensors))!r}")
    variant = _variant(_depths(tensors), tensors[name].shape[0], file)
    network = mit(variant)
    account = load_into(network, tensors).summary(file)
    out.mkdir(parents=True, exist_ok=True)
    part = out / ".model.safetensors.partial"
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, part)
    os.replace(part, out / "model.safetensors")
    return f"MiT-{variant.upper()}; {account}\nwritten: {out} (use it as model.weights={out})"


def _released(tensors: StateDict, file: str, out: Path, dataset: str | Path | None, modalities: tuple[str, ...]) -> str:
    name = "backbone.backbone.stages.0.embed.proj.weight"
    try:
        streams = tensors["ensemble.alpha"].numel()
        classes, width = tensors["head.classify.weight"].shape[:2]
        variant = _variant(_depths(tensors), tensors[name].shape[0], file)
    except KeyError as error:
        raise UserError(
            f"{file}: key {error.args[0]!r} (in our names) is missing: not a whole segmentation file"
        ) from None
    if len(modalities) != streams:
        raise UserError(f"{file}: has {streams} streams; --modalities names {len(modalities)}")
    if dataset is None:
        raise UserError(f"{file}: has {classes} classes; say with --dataset how they are called and how files are read")
    folder = Folder(dataset)
    if len(folder.classes) != classes:
        raise UserError(f"{folder.file}: names {len(folder.classes)} classes, {file} has {classes}")
    folder.select(modalities)
    content = read_recipe("nyudv2-mit-b2-released").model_dump(mode="json")
    content["description"] = f"converted from {Path(file).name}"
    content["data"] |= {"root": str(dataset), "modalities": list(modalities)}
    content["model"] |= {"weights": None}
    content["model"]["backbone"] |= {"variant": variant}
    content["model"]["head"] |= {"width": width}
    recipe = validate(content, file)
    task_package(recipe.task).save(recipe, folder.spec, tensors, out)
    return (
        f"TokenFusion segmentation, MiT-{variant.upper()}, {classes} classes, {', '.join(modalities)}\nwritten: {out}"
    )
