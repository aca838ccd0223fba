"""Run folders as they are read: what they say of themselves, and what is said of damaged ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from report.fake import damage, fake_run
from report.fake_translation import fake_translation

from tokenfusion.errors import UserError
from tokenfusion.report.run import collapse, component, read_run


def test_whole_run_states_its_facts(tmp_path: Path) -> None:
    run = read_run(fake_run(tmp_path / "run", samples=0, points=2))
    facts = run.facts()
    assert facts["Step"] == "20,000 of 20,000"
    assert facts["Fuser"] == "TokenFusion (rule released, threshold 0.02)"
    assert facts["Evaluated on"] == "val · 654 images"
    assert facts["Training time"] == "8 h 53 min"
    assert facts["Data set"] == "data/nyudv2"
    assert "Parameters" not in facts
    assert run.modalities() == ["rgb", "depth"]


def test_recipe_alone_is_a_run(tmp_path: Path) -> None:
    damage(tmp_path / "recipe.yaml", "seed: 1\nfuser: null\ndata: {modalities: rgb}\n")
    run = read_run(tmp_path)
    assert run.facts() == {"Modalities": "rgb", "Fuser": "none", "Seed": "1"}
    assert run.figures() == {}
    assert run.threshold() is None


def test_data_set_is_named_by_its_evaluation(tmp_path: Path) -> None:
    damage(tmp_path / "recipe.yaml", "data: {root: somewhere}\n")
    damage(tmp_path / "metrics.json", '{"dataset": "rooms"}')
    assert read_run(tmp_path).facts()["Data set"] == "rooms"


def test_threshold_of_the_samples_counts_before_that_of_the_recipe(tmp_path: Path) -> None:
    damage(tmp_path / "recipe.yaml", "fuser: {threshold: 0.5}\n")
    assert read_run(tmp_path).threshold() == 0.5
    (tmp_path / "samples").mkdir()
    damage(tmp_path / "samples" / "index.json", '{"threshold": 0.25}')
    assert read_run(tmp_path).threshold() == 0.25


def test_without_eval_the_last_evaluation_of_training_counts(tmp_path: Path) -> None:
    damage(tmp_path / "recipe.yaml", "data: {modalities: [rgb, depth]}\n")
    lines = [
        {"step": 20, "split": "val", "rgb/miou": 2.0, "ensemble/miou": 3},
        {"step": 10, "split": "val", "rgb/miou": 1.0},
        {"step": 30, "split": "train", "loss/rgb": 0.5},
    ]
    damage(tmp_path / "metrics.jsonl", "\n\n".join(map(json.dumps, lines)))
    run = read_run(tmp_path)
    assert [line["step"] for line in run.lines] == [10, 20, 30]
    assert run.figures() == {"rgb": {"miou": 2.0}, "ensemble": {"miou": 3.0}}


def test_translation_states_its_target_and_what_ranks(tmp_path: Path) -> None:
    run = read_run(fake_translation(tmp_path / "run", features="pixels 8x8", samples=0, points=0))
    assert (run.task(), run.target(), run.primary()) == ("translation", "normal", "fid")
    assert run.facts()["Target"] == "normal"
    assert run.facts()["Protocol"].endswith("on pixels 8x8")
    (tmp_path / "run" / "metrics.json").unlink()
    assert read_run(tmp_path / "run").target() == "normal"


@pytest.mark.parametrize(("row", "primary"), [({"mae": 1, "miou": 2}, "miou"), ({"mse": 1, "fid": 2}, "mse"), ({}, "")])
def test_primary_that_is_not_stated_is_miou_or_the_first(tmp_path: Path, row: dict[str, float], primary: str) -> None:
    damage(tmp_path / "recipe.yaml", "seed: 1\n")
    damage(tmp_path / "metrics.json", json.dumps({"streams": {"rgb": row}}))
    assert read_run(tmp_path).primary() == primary


def test_collapse_is_told_for_every_number_of_streams() -> None:
    assert collapse([]) == ""
    assert collapse(["rgb"]).startswith("The images made by rgb have collapsed")
    assert "by rgb, depth and ensemble have" in collapse(["rgb", "depth", "ensemble"])


def test_ensemble_of_one_stream_is_left_out(tmp_path: Path) -> None:
    damage(tmp_path / "recipe.yaml", "data: {modalities: [rgb]}\n")
    damage(tmp_path / "metrics.json", json.dumps({
        "streams": {"rgb": {"miou": 1}, "ensemble": {"miou": 1}}, "classes": ["a"], "collapsed": ["rgb", "ensemble"],
        "per_class": {"rgb": {"iou": [1]}, "ensemble": {"iou": [1]}},
    }))  # fmt: skip
    line = {"step": 1, "split": "val", "rgb/miou": 1, "ensemble/miou": 1, "loss/ensemble": 2}
    damage(tmp_path / "metrics.jsonl", json.dumps(line))
    run = read_run(tmp_path)
    assert run.figures() == {"rgb": {"miou": 1}}
    assert run.evaluation.per_class.keys() == {"rgb"}
    assert run.evaluation.collapsed == ["rgb"]
    assert run.lines == [{"step": 1, "split": "val", "rgb/miou": 1}]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "none"),
        ("concat", "concat"),
        ({"_target_": "a.b.Fuser"}, "Fuser"),
        ({"_target_": "a.b.Fuser", "k": 2, "inner": {"x": 1}, "flag": True}, "Fuser (k 2, flag True)"),
    ],
)
def test_component_in_a_few_words(value: object, words: str) -> None:
    assert component(value) == words


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("recipe.yaml", "a: [1", "cannot be read"),
        ("recipe.yaml", "- 1", "a mapping is wanted"),
        ("metrics.json", "{", "cannot be read"),
        ("metrics.json", '{"streams": {"rgb": 3}}', "key streams.rgb"),
        (
            "metrics.json",
            '{"classes": ["a"], "per_class": {"rgb": {"iou": [1, 2]}}}',
            "per_class.rgb.iou holds 2 values, not 1",
        ),
        ("metrics.json", '{"primary": "fid", "streams": {"rgb": {"mae": 1}}}', "primary is 'fid', which no stream has"),
        ("metrics.json", '{"collapsed": "rgb"}', "key collapsed"),
        ("metrics.jsonl", '{"step": 1, "split": "val"}\n{"step": 2, "sp', "line 2"),
        ("metrics.jsonl", "[1]\n", "line 1"),
        ("samples/index.json", '{"ids": 3}', "key ids"),
        ("samples/index.json", '{"ids": [], "classes": [{"name": "a", "color": [0, 0, 256]}]}', "classes.0.color"),
    ],
)
def test_damage_names_the_file_in_one_line(tmp_path: Path, name: str, text: str, said: str) -> None:
    damage(tmp_path / "recipe.yaml", "seed: 1\n")
    (tmp_path / "samples").mkdir()
    damage(tmp_path / name, text)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        read_run(tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_not_a_run_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match="is not a run folder"):
            read_run(path)
