"""Generators that are judged with inputs missing or worse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tasks.translation.nano import recipe
from tasks.walk import command, lines

import tokenfusion
from tokenfusion import api
from tokenfusion.data import Folder
from tokenfusion.tasks.translation.inference import infer
from tokenfusion.tasks.translation.metrics import image_errors, mean_over_pixels
from tokenfusion.tasks.translation.task import frames


@pytest.mark.parametrize(("given", "missing"), [(("rgb", "depth"), ()), (("rgb",), ("depth",)), (("depth",), ("rgb",))])
def test_every_subset_is_judged_as_the_model_given_no_more(
    run: Path, rooms: Path, tmp_path: Path, given: tuple[str, ...], missing: tuple[str, ...]
) -> None:
    model, errors = tokenfusion.load(run), []
    for frame in frames(api.recipe_of(run), Folder(rooms), "val"):  # type: ignore[arg-type]
        seen = infer(model, {name: frame.inputs[name] for name in given})  # type: ignore[arg-type]
        errors.append(image_errors(seen.images["ensemble"], frame.target, frame.valid))  # type: ignore[arg-type]
    found = api.evaluate(run, evaluation={"missing": missing}, to=tmp_path / "a.json")
    assert list(found["streams"]) == [*given, "ensemble"]
    assert found["streams"]["ensemble"]["mae"] == mean_over_pixels(torch.stack(errors))[0]
    assert ("without" in found["protocol"]) == bool(missing)
    assert all(rates[name] == 0 for rates in found["exchange"].values() for name in missing)


def test_degraded_twice_alike_and_the_target_is_not_touched(run: Path, tmp_path: Path) -> None:
    change = {"degrade": {"rgb": {"kind": "noise", "amount": 0.3}, "depth": {"kind": "shift", "amount": 3}}}
    first, again = (api.evaluate(run, evaluation=change, to=tmp_path / f"{i}.json") for i in range(2))
    assert first == again
    assert "measured pixels, rgb with noise 0.3, depth with shift 3; FID" in first["protocol"]
    plain = json.loads((run / "metrics.json").read_text())["streams"]
    assert all(first["streams"][name] != plain[name] for name in ("rgb", "depth", "ensemble"))


def test_the_target_is_no_input(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change = "evaluation.degrade={normal: {kind: noise, amount: 0.1}}"
    message = command("eval", run, change, "--to", tmp_path / "a.json", code=2, capsys=capsys)
    assert "names 'normal', which is no input here" in message


@pytest.mark.parametrize("sharing", ["shared", "unshared"])
def test_generators_that_share_otherwise(sharing: str, rooms: Path, run: Path, tmp_path: Path) -> None:
    keys = ["train.steps=2", f"model.sharing={sharing}", "evaluation.missing=[rgb]"]
    api.train(recipe(rooms, "normal", *keys), tmp_path)
    sizes = [sum(p.numel() for p in tokenfusion.load(path).backbone.backbone.parameters()) for path in (tmp_path, run)]  # type: ignore[union-attr]
    assert (sizes[0] < sizes[1]) == (sharing == "shared")
    in_training, own = lines(tmp_path, "val")[-1], json.loads((tmp_path / "metrics.json").read_text())
    assert own["streams"]["ensemble"]["mae"] == in_training["ensemble/mae"]
    assert list(own["streams"]) == ["depth", "ensemble"]
