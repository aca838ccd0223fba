"""Foreign checkpoints in our format."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tokenfusion.api import task_package
from tokenfusion.backbones import mirror
from tokenfusion.backbones.keys import (
    from_hf_segformer,
    from_released_segmentation,
    from_released_translation,
    from_segformer,
)
from tokenfusion.backbones.mit import DEPTHS, WIDTHS, mit
from tokenfusion.backbones.weights import StateDict, load_into, read_checkpoint
from tokenfusion.data.folder import Folder
from tokenfusion.errors import UserError, nearest
from tokenfusion.recipe import read_recipe, validate

SINGLE_MODAL = {"segformer": from_segformer, "hf-segformer": from_hf_segformer}
FUSED = ("released-segmentation", "released-translation")
KINDS = (*FUSED, *SINGLE_MODAL)


def convert(
    file: str | Path,
    kind: str,
    out: str | Path,
    dataset: str | Path | None = None,
    modalities: tuple[str, ...] = ("rgb", "depth"),
    target: str = "rgb",
) -> str:
    """Write a foreign checkpoint as a run folder (fused) or as ``model.safetensors`` (single-modal).

    Args:
        file: ``.pth``, ``.pth.tar``, ``.bin``, ``.safetensors`` or a folder that holds one.
        kind: ``released-segmentation``, ``released-translation`` (the generator's file), ``segformer`` (original
            mit_b*.pth) or ``hf-segformer``.
        out: new folder. A run folder goes to ``eval``, ``predict`` and :func:`tokenfusion.load`; single-modal weights are
            what a recipe's ``model.weights`` names.
        dataset: for fused checkpoints: a data set folder or dataset.yaml that says how files are read and names the classes.
        modalities: names of the streams, in the file's order.
        target: for translation: the modality that is generated.

    Returns:
        a few printable lines: what was found and written.
    """
    if kind not in KINDS:
        raise UserError(f"--from {kind}: unknown kind of checkpoint; {nearest(kind, KINDS)}")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty, or is no folder; choose a new one")
    source, names = read_checkpoint(file), tuple(name.strip() for name in modalities)
    if kind in SINGLE_MODAL:
        return _single(SINGLE_MODAL[kind](source), str(file), out)
    rename = from_released_segmentation if kind == "released-segmentation" else from_released_translation
    try:
        tensors = rename(source)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    if kind == "released-segmentation":
        return _segmentation(tensors, str(file), out, dataset, names)
    return _translation(tensors, str(file), out, dataset, names, target)


def _variant(depths: list[int], width: int, file: str) -> str:
    for variant, known in DEPTHS.items():
        if list(known) == depths and WIDTHS.get(variant, (64,))[0] == width:
            return variant
    raise UserError(f"{file}: depths {depths} at width {width} are none of MiT-B0 to B5")


def _depths(tensors: StateDict, stages: int = 4) -> list[int]:
    found = [re.search(r"stages\.(\d)\.blocks\.(\d+)\.", key) for key in tensors]
    blocks = {(int(m.group(1)), int(m.group(2))) for m in found if m}
    return [1 + max((b for s, b in blocks if s == stage), default=-1) for stage in range(stages)]


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


FIRST = "backbone.backbone.stages.0.embed.proj.weight"


def _segmentation(
    tensors: StateDict, file: str, out: Path, dataset: str | Path | None, modalities: tuple[str, ...]
) -> str:
    streams, width = _size(tensors, "ensemble.alpha", file)[0], _size(tensors, FIRST, file)[0]
    classes, head = _size(tensors, "head.classify.weight", file)[:2]
    variant = _variant(_depths(tensors), width, file)
    if dataset is None:
        raise UserError(f"{file}: has {classes} classes; say with --dataset how they are called and how files are read")
    folder = _described(file, dataset, streams, modalities)
    if len(folder.classes) != classes:
        raise UserError(f"{folder.file}: names {len(folder.classes)} classes, {file} has {classes}")
    content = _content("nyudv2-mit-b2-released", file, dataset, modalities)
    content["model"] |= {"weights": None}
    content["model"]["backbone"] |= {"variant": variant}
    content["model"]["head"] |= {"width": head}
    _save(content, folder, tensors, file, out)
    return (
        f"TokenFusion segmentation, MiT-{variant.upper()}, {classes} classes, {', '.join(modalities)}\nwritten: {out}"
    )


def _translation(
    tensors: StateDict, file: str, out: Path, dataset: str | Path | None, modalities: tuple[str, ...], target: str
) -> str:
    streams, width = _size(tensors, "ensemble.alpha", file)[0], _size(tensors, FIRST, file)[0]
    depths = tuple(_depths(tensors, len(mirror.WIDE)))
    sizes = {name: (mirror.WIDTHS.get(name, mirror.WIDE)[0], mirror.DEPTHS[name]) for name in mirror.DEPTHS}
    variant = next((name for name in reversed(sizes) if sizes[name] == (width, depths)), None)
    if variant is None:
        raise UserError(f"{file}: depths {list(depths)} at width {width} are none of the generators {', '.join(sizes)}")
    if dataset is None:
        raise UserError(f"{file}: has {streams} streams; say with --dataset how their files are read and written")
    folder = _described(file, dataset, streams, modalities, (target,))
    content = _content("taskonomy-shade-texture-to-rgb-released", file, dataset, modalities)
    content["data"] |= {"target": target}
    for part in ("generator", "discriminator"):
        content["model"][part] |= {"variant": variant}
    _save(content, folder, tensors, file, out)
    return f"TokenFusion translation, {variant}, {', '.join(modalities)} -> {target}\nwritten: {out}"


def _size(tensors: StateDict, name: str, file: str) -> tuple[int, ...]:
    """The shape of a tensor that a whole file holds."""
    if name not in tensors:
        raise UserError(f"{file}: key {name!r} (in our names) is missing: not a whole file of this kind")
    return tuple(tensors[name].shape)


def _described(
    file: str, dataset: str | Path, streams: int, modalities: tuple[str, ...], target: tuple[str, ...] = ()
) -> Folder:
    """The data set, which must know the streams' names and the target's."""
    if len(modalities) != streams:
        raise UserError(f"{file}: has {streams} streams; --modalities names {len(modalities)}")
    folder = Folder(dataset)
    folder.select([*modalities, *target])
    return folder


def _content(recipe: str, file: str, dataset: str | Path, modalities: tuple[str, ...]) -> dict[str, Any]:
    """A shipped recipe's content for a converted file."""
    content = read_recipe(recipe).model_dump(mode="json")
    content["description"] = f"converted from {Path(file).name}"
    content["data"] |= {"root": str(dataset), "modalities": list(modalities)}
    return content


def _save(content: dict[str, Any], folder: Folder, tensors: StateDict, file: str, out: Path) -> None:
    recipe = validate(content, file)
    task_package(recipe.task).save(recipe, folder.spec, tensors, out)
