"""Foreign checkpoints in our format."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tokenfusion.api import save
from tokenfusion.backbones import mirror
from tokenfusion.backbones.detection_keys import from_groupfree
from tokenfusion.backbones.keys import (
    from_hf_dinov2,
    from_hf_segformer,
    from_released_segmentation,
    from_released_translation,
    from_segformer,
)
from tokenfusion.backbones.mit import DEPTHS, WIDTHS, mit
from tokenfusion.backbones.weights import LoadReport, StateDict, load_into, read_checkpoint
from tokenfusion.backbones.yolos import yolos
from tokenfusion.backbones.yolos_keys import from_hf_yolos, from_yolos, load_detector, variant_of
from tokenfusion.data.folder import Folder
from tokenfusion.errors import UserError, nearest
from tokenfusion.recipe import read_recipe, validate

SINGLE_MODAL = {"segformer": from_segformer, "hf-segformer": from_hf_segformer}  # MiT
FUSED = ("released-segmentation", "released-translation")
IMAGE = {"yolos": from_yolos, "hf-yolos": from_hf_yolos, "deit": None}  # detectors of images; DeiT starts one
KINDS = (*FUSED, "groupfree", *SINGLE_MODAL, *IMAGE, "hf-dinov2")


def convert(
    file: str | Path,
    kind: str,
    out: str | Path,
    dataset: str | Path | None = None,
    modalities: tuple[str, ...] = ("rgb", "depth"),
    target: str = "rgb",
) -> str:
    """Write a foreign checkpoint as a run folder (a whole model) or as ``model.safetensors`` (a network to start from).

    Args:
        file: ``.pth``, ``.pth.tar``, ``.bin``, ``.safetensors``, ``.npz`` or a folder that holds one.
        kind: ``released-segmentation``, ``released-translation`` (the generator's file), ``groupfree`` (a detector of
            points), ``segformer`` (original mit_b*.pth), ``hf-segformer``, ``hf-dinov2``, ``yolos``,
            ``hf-yolos`` or ``deit``.
        out: new folder. A run folder goes to ``eval``, ``predict`` and :func:`tokenfusion.load`; single-modal weights are
            what a recipe's ``model.weights`` (``model.image_weights``) names.
        dataset: for whole models: a data set folder or dataset.yaml that says how files are read and names the classes.
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
    whole = {"released-segmentation": from_released_segmentation, "released-translation": from_released_translation}
    try:
        if kind in SINGLE_MODAL:
            return _single(SINGLE_MODAL[kind](source), str(file), out)
        if kind == "hf-dinov2":
            return _dinov2(from_hf_dinov2(source), str(file), out)
        if kind in IMAGE:
            return _image(source, kind, str(file), out)
        tensors = whole.get(kind, from_groupfree)(source)
    except UserError as error:
        raise UserError(f"{file}: {str(error).removeprefix(f'{file}: ')}") from None
    if kind == "groupfree":
        return _groupfree(tensors, str(file), out, dataset)
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
    account = load_into(network, tensors)
    _write_weights(network.state_dict(), out)
    return f"MiT-{variant.upper()}; {account.summary(file)}\nwritten: {out} (use it as model.weights={out})"


def _dinov2(tensors: StateDict, file: str, out: Path) -> str:
    dim, _, patch, _ = _size(tensors, "patch_embed.proj.weight", file)
    depth = len({key.split(".")[1] for key in tensors if key.startswith("blocks.")})
    _write_weights(tensors, out)
    found = f"DINOv2 in timm's names: width {dim}, {depth} blocks, patches of {patch} pixels"
    return f"{found}\nwritten: {out} (use it as model.weights={out})"


def _write_weights(tensors: StateDict, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    part = out / ".model.safetensors.partial"
    save_file({k: v.contiguous() for k, v in tensors.items()}, part)
    os.replace(part, out / "model.safetensors")


def _image(source: StateDict, kind: str, file: str, out: Path) -> str:
    """YOLOS whole; of a DeiT what a YOLOS of its size starts from, its positions resampled."""
    rename = IMAGE[kind]
    if rename is None:
        _size(source, "patch_embed.proj.weight", file)
    ours = {f"vit.{key}": value for key, value in source.items()} if rename is None else rename(source)
    variant = variant_of(ours)
    classes = ours["class_head.4.bias"].shape[0] - 1 if "class_head.4.bias" in ours else 91
    detections = ours["det_token"].shape[1] if "det_token" in ours else 100
    network = yolos(variant, classes, detections)
    account: LoadReport = load_detector(network, source if rename is None else ours)
    state = network.state_dict()
    _write_weights({name: state[name] for name in (*account.loaded, *account.copied)}, out)
    return f"YOLOS {variant}; {account.summary(file)}\nwritten: {out} (use it as model.image_weights={out})"


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


def _groupfree(tensors: StateDict, file: str, out: Path, dataset: str | Path | None) -> str:
    """The file does not say how many proposals it was trained with: as published, 512 for twelve layers of double width."""
    classes = _size(tensors, "heads.0.classify.weight", file)[0]
    wide, channels = _size(tensors, "backbone.down.0.layers.0.linear.weight", file)
    _size(tensors, "decoder.0.fc1.weight", file)
    layers = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("decoder."))
    width, agnostic = wide / 64, "heads.0.size.weight" in tensors
    proposals = 512 if layers == 12 and width == 2 else 256
    if channels != 3:
        raise UserError(f"{file}: takes points of {channels} channels; recipes know x y z alone")
    if dataset is None:
        raise UserError(f"{file}: has {classes} classes; say with --dataset how they are called and how files are read")
    folder = Folder(dataset)
    if len(folder.scene.classes) != classes:
        raise UserError(f"{folder.file}: scene names {len(folder.scene.classes)} classes, {file} has {classes}")
    content = _content("sunrgbd-l6-o256" if agnostic else "scannet-l6-o256", file, dataset, ("points",))
    content["model"]["points"] |= {"layers": layers, "proposals": proposals, "width": int(width)}
    content["model"]["points"] |= {"heading_bins": _size(tensors, "heads.0.heading_class.weight", file)[0]}
    if agnostic:  # as the published ones were trained
        content["loss"]["points"] |= {"gt_size": "groupfree"}
    if not agnostic and len(content["model"]["points"]["mean_sizes"]) != classes:
        raise UserError(
            f"{file}: sizes are relative to the means of {classes} classes, which only ScanNet's 18 have here"
        )
    _save(content, folder, {f"points.{name}": value for name, value in tensors.items()}, file, out)
    return f"Group-Free L{layers} O{proposals}, width {width:g}, {classes} classes\nwritten: {out}"


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
    save(recipe, folder.spec, tensors, out)
