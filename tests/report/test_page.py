"""The report and the comparison, written for run folders that the tests draw themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from tokenfusion.errors import UserError
from tokenfusion.report import write_comparison, write_report

STAGES = {"stage1": ((1, 8), 2), "stage2": ((1, 16), 2), "stage3": ((1, 32), 3), "stage4": ((1, 64), 2)}
BLOCKS = [f"{stage}.{number}" for stage, (_, depth) in STAGES.items() for number in range(depth)]
CLASSES = ["wall", "floor", "ceiling", 'a "box" <b>&', "poster", "lamp", "rug $x$", "door"]


def scene(seed: int, height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """A drawn room: rgb [H, W, 3], depth as grey [H, W, 3], class ids [H, W]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j]  # fmt: skip
    horizon, corner = rng.uniform(0.55, 0.68), rng.uniform(0.25, 0.7)
    label = np.where(y > horizon + 0.12 * np.abs(x - corner), 1, np.where(y < 0.16 - 0.1 * np.abs(x - corner), 2, 0))
    depth = np.where(label == 1, 1.35 - y, 0.72 - 0.25 * np.abs(x - corner))
    depth = np.where(label == 2, 0.5 + y, depth)
    for kind, (cx, cy, w, h, near) in {
        7: (0.12, 0.48, 0.12, 0.5, 0.0), 4: (0.62, 0.36, 0.2, 0.2, 0.0), 6: (0.55, 0.86, 0.5, 0.12, 0.0),
        3: (0.75, 0.66, 0.22, 0.3, 0.3), 5: (0.38, 0.55, 0.05, 0.34, 0.25),
    }.items():  # fmt: skip
        cx, cy = cx + rng.uniform(-0.06, 0.06), cy + rng.uniform(-0.03, 0.03)
        inside = (np.abs(x - cx) < w / 2) & (np.abs(y - cy) < h / 2)
        label, depth = np.where(inside, kind, label), np.where(inside & (near > 0), 0.75 - near, depth)
    colours = np.array(
        [[196, 188, 172], [148, 112, 82], [228, 226, 220], [190, 182, 168], [178, 62, 52], [240, 214, 130],
         [76, 104, 128], [118, 84, 60]], np.float32,
    )  # fmt: skip
    light = 0.75 + 0.35 * np.exp(-((x - 0.4) ** 2 + (y - 0.2) ** 2) * 3)
    rgb = colours[label] * light[..., None] + rng.normal(0, 3, (height, width, 1))
    label = np.where((np.abs(np.diff(label, axis=1, prepend=label[:, :1])) > 0), 255, label)
    grey = np.repeat((255 * depth.clip(0, 1))[..., None], 3, axis=2)
    return rgb.clip(0, 255).astype(np.uint8), grey.astype(np.uint8), label.astype(np.uint8)


def guess(label: NDArray[np.uint8], rng: np.random.Generator, wrong: float) -> NDArray[np.uint8]:
    """A prediction: the target with blocks of it exchanged for another class."""
    height, width = label.shape
    cells = rng.random((height // 12 + 1, width // 12 + 1)) < wrong
    bad = np.kron(cells, np.ones((12, 12), bool))[:height, :width]
    shifted = np.roll(label, 5, axis=1)
    found = np.where(bad, rng.integers(0, len(CLASSES)), np.where(shifted == 255, 0, shifted))
    return found.astype(np.uint8)


def field(rng: np.random.Generator, height: int, width: int, level: float) -> NDArray[np.float16]:
    """Smooth scores in 0..1, of which about ``level`` lie below 0.02."""
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j]  # fmt: skip
    waves = sum(np.sin(a * 6 * x + b * 6 * y + c) for a, b, c in rng.uniform(-2, 2, (5, 3)))
    order = np.argsort(np.argsort(np.asarray(waves).ravel())).reshape(height, width) / (height * width)
    return np.clip(0.02 + (order - level) * 0.9, 0, 1).astype(np.float16)


def fake_run(
    path: Path,
    modalities: Sequence[str] = ("rgb", "depth"),
    fuser: str = "token",
    samples: int = 1,
    size: tuple[int, int] = (120, 160),
    points: int = 40,
    images: bool = False,
    seed: int = 0,
) -> Path:
    """Draw a run folder in the format of the contracts, the same for the same arguments."""
    rng = np.random.default_rng(seed)
    scored = fuser == "token"
    streams = [*modalities, "ensemble"] if len(modalities) > 1 else list(modalities)
    (path / "samples").mkdir(parents=True)
    recipe = {
        "seed": seed,
        "task": "segmentation",
        "data": {"root": "data/nyudv2", "modalities": list(modalities)},
        "fuser": {"_target_": "tokenfusion.fusion.fusers.TokenFusion", "rule": "released", "threshold": 0.02}
        if scored
        else fuser,
        "train": {"steps": 20000, "batch_size": 8, "lr": 6e-5, "precision": "bf16", "devices": 1},
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    level = {(b, m): rng.uniform(0.02, 0.98) ** 2 for b in BLOCKS for m in modalities}
    final = {stream: 34 + 8 * rng.random() + 7 * (stream == "ensemble") for stream in streams}
    with (path / "metrics.jsonl").open("w") as file:
        for point in range(1, points + 1):
            part, step = point / points, 20000 * point // points
            line: dict[str, Any] = {"step": step, "split": "train", "time": 1.6 * step, "lr": 6e-5 * (1 - part) ** 0.9}
            line |= {f"loss/{stream}": 0.5 + 2.6 * np.exp(-4 * part) + 0.15 * rng.random() for stream in streams}
            line["loss/total"] = sum(value for name, value in line.items() if name.startswith("loss/"))
            if scored:
                line["loss/sparsity"] = 0.05 + 0.4 * np.exp(-6 * part)
                for (block, name), rate in level.items():
                    line[f"exchange/{block}/{name}"] = rate / (1 + np.exp(-12 * (part - 0.4)))
                    line[f"donor_below/{block}/{name}"] = min(1.0, 0.2 + rate)
            file.write(json.dumps(line) + "\n")
            if point % max(points // 8, 1) == 0:
                figures = {f"{name}/miou": value * (1 - np.exp(-5 * part)) for name, value in final.items()}
                file.write(json.dumps({"step": step, "split": "val", "time": 1.6 * step, **figures}) + "\n")
    _write_evaluation(path, rng, modalities, streams, final, level if scored else {}, images)
    _write_samples(path, rng, modalities, streams, scored, samples, size, images, level)
    return path


def _write_evaluation(
    path: Path, rng: np.random.Generator, modalities: Sequence[str], streams: list[str], final: dict[str, float],
    level: dict[tuple[str, str], float], images: bool,
) -> None:  # fmt: skip
    exchange = {b: {m: level[b, m] if b != "stage3.1" else 0.0 for m in modalities} for b in BLOCKS} if level else {}
    iou = {name: [float(rng.uniform(value - 25, value + 25)) for _ in CLASSES] for name, value in final.items()}
    table = {name: {"pixel_accuracy": v + 24, "mean_accuracy": v + 11, "miou": v} for name, v in final.items()}
    evaluation: dict[str, Any] = {
        "task": "segmentation", "split": "val", "images": 654, "streams": table, "checkpoint": "checkpoints/best",
        "protocol": "single scale, no flip, batch 1, fp32, crop of the data set", "step": 20000, "classes": CLASSES,
        "per_class": {s: {"iou": [*v[:-1], None], "accuracy": [x + 9 for x in v]} for s, v in iou.items()},
        "exchange": exchange, "donor_below": {b: dict.fromkeys(modalities, 0.64) for b in exchange},
    }  # fmt: skip
    if images:
        table = {name: {"fid": 90 - v, "mae": v / 1000} for name, v in final.items()}
        evaluation |= {"task": "translation", "streams": table, "classes": [], "per_class": {}}
    (path / "metrics.json").write_text(json.dumps(evaluation))


def _write_samples(
    path: Path, rng: np.random.Generator, modalities: Sequence[str], streams: list[str], scored: bool, samples: int,
    size: tuple[int, int], images: bool, level: dict[tuple[str, str], float],
) -> None:  # fmt: skip
    colours = [[174, 199, 232], [152, 223, 138], [240, 240, 215], [31, 119, 180], [214, 39, 40], None, [148, 103, 189]]
    index = {
        "task": "translation" if images else "segmentation", "ids": [f"{n:04d}" for n in range(samples)],
        "modalities": list(modalities), "blocks": BLOCKS if scored else [], "threshold": 0.02 if scored else None,
        "classes": [{"name": n, "color": c} for n, c in zip(CLASSES, [*colours, None], strict=True)], "ignore": 255,
    }  # fmt: skip
    (path / "samples" / "index.json").write_text(json.dumps(index))
    for number in range(samples):
        rgb, depth, label = scene(number, *size)
        arrays: dict[str, Any] = {f"input/{m}": rgb if m == "rgb" else depth for m in modalities}
        arrays["target"] = rgb if images else label
        for stream in streams:
            wrong = 0.02 if stream == "ensemble" else 0.1
            noise = rng.integers(-30, 30, rgb.shape)
            shown = (rgb + noise).clip(0, 255).astype(np.uint8) if images else guess(label, rng, wrong)
            arrays[f"prediction/{stream}"] = shown
        for block in BLOCKS if scored else []:
            divisor = STAGES[block.split(".")[0]][0][1] // 2
            grid = (-(-size[0] // divisor), -(-size[1] // divisor))
            arrays[f"scores/{block}"] = np.stack([field(rng, *grid, level[block, m]) for m in modalities])
        np.savez(path / "samples" / f"{number:04d}.npz", **arrays)


class Page(HTMLParser):
    """What a browser would load, and the text that it would show."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.captions: list[str] = []
        self.shown: list[str] = []
        self.feed(self.html)
        self.text = " ".join(" ".join(self.shown).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.loaded += [found[name] for name in ("src", "srcset") if name in found]
        self.links += [found["href"]] if "href" in found else []
        self.ids += [found["id"]] if "id" in found else []
        self.captions += [found["alt"]] if "alt" in found else []

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"] or "{" not in data:
            self.shown.append(data)


def damage(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a whole run, written once; only read it."""
    return write_report(fake_run(tmp_path_factory.mktemp("full") / "run"))


def test_report_is_one_file_that_loads_nothing(full: Path) -> None:
    assert full.name == "report.html"
    assert (full.parent / "recipe.yaml").exists()
    page = Page(full)
    assert page.loaded
    assert all(source.startswith("data:image/") for source in page.loaded)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "url(" not in page.html
    assert page.links
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not list(full.parent.glob(".*")), "a temporary file is left"


def test_report_is_a_function_of_the_run(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", points=2, size=(48, 64), fuser="none")
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_headline_compares_the_ensemble_with_the_best_stream(full: Path) -> None:
    streams = json.loads((full.parent / "metrics.json").read_text())["streams"]
    best = max(("rgb", "depth"), key=lambda name: streams[name]["miou"])
    text = Page(full).text
    assert f"{streams['ensemble']['miou'] - streams[best]['miou']:+.1f} against the best single stream, {best}" in text
    for row in streams.values():
        assert " ".join(f"{row[name]:.1f}" for name in ("miou", "pixel_accuracy", "mean_accuracy")) in text
    for fact in ("20,000 of 20,000", "TokenFusion (rule released, threshold 0.02)", "val · 654 images", "8 h 53 min"):
        assert fact in text


def test_names_are_escaped(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", fuser="none", points=0)
    damage(run / "recipe.yaml", "seed: 1\nfuser: <script>alert(1)</script>\n")
    page = Page(write_report(run))
    assert "script" not in page.tags
    assert "<b>&" not in page.html
    assert 'a "box" <b>&' in page.text
    assert "<script>alert(1)</script>" in page.text


def test_maps_of_exchanged_tokens_state_their_share(full: Path) -> None:
    page = Page(full)
    with np.load(full.parent / "samples" / "0000.npz") as archive:
        exchanged = archive["scores/stage4.1"].astype(np.float32) < np.float32(0.02)
    both = exchanged.all(axis=0).sum()
    for stream in exchanged:
        share, part = 100 * stream.mean(), 100 * both / stream.sum()
        assert f"stage4.1, {share:.0f} %, {part:.0f} % of them blue" in page.captions
    blocks = ["stage1.0", "stage1.1", "stage2.0", "stage2.1", "stage3.0", "stage3.2", "stage4.0", "stage4.1"]
    shown = [caption.split(",")[0] for caption in page.captions if caption.startswith("stage")]
    assert sorted(shown) == sorted(2 * blocks)


def test_three_streams_leave_the_stand_in_out(tmp_path: Path) -> None:
    page = Page(write_report(fake_run(tmp_path / "run", modalities=("rgb", "depth", "normal"), points=2)))
    assert "do not tell which stream stood in" in page.text
    assert not any("blue" in caption for caption in page.captions)
    assert sum(caption.startswith("stage") for caption in page.captions) == 3 * 8


@pytest.mark.parametrize("fuser", ["none", "concat"])
def test_fuser_without_scores_says_so(tmp_path: Path, fuser: str) -> None:
    text = Page(write_report(fake_run(tmp_path / "run", fuser=fuser, points=0))).text
    assert "its fuser substitutes no tokens" in text
    assert "this fuser scores no tokens" in text


def test_threshold_comes_from_the_recipe_or_is_not_claimed(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", samples=0, points=2)
    (run / "samples" / "index.json").unlink()
    assert "below the threshold of 0.02 is substituted" in Page(write_report(run)).text
    damage(run / "recipe.yaml", "fuser: random\n")
    text = Page(write_report(run)).text
    assert "states no threshold of scores" in text
    assert "a small network gives" not in text


def test_single_modality_and_no_samples_are_said(tmp_path: Path) -> None:
    text = Page(write_report(fake_run(tmp_path / "run", modalities=("rgb",), fuser="none", samples=0, points=2))).text
    assert "a single stream, so there is nothing to exchange" in text
    assert "No samples were kept" in text
    assert "against the best single stream" not in text


def test_recipe_alone_is_a_run(tmp_path: Path) -> None:
    damage(tmp_path / "recipe.yaml", "seed: 1\n")
    text = Page(write_report(tmp_path)).text
    for sentence in ("has not been evaluated yet", "no metrics.jsonl", "No samples", "no figures by class"):
        assert sentence in text


def test_without_eval_the_last_evaluation_of_training_counts(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", samples=0, fuser="none", points=9)
    last = [line for line in map(json.loads, (run / "metrics.jsonl").open()) if line["split"] == "val"][-1]
    (run / "metrics.json").unlink()
    text = Page(write_report(run)).text
    assert "Figures of the last evaluation during training" in text
    assert f"{last['ensemble/miou']:.1f}" in text


def test_run_without_val_lines_says_so(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", samples=0, fuser="none", points=2)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    damage(run / "metrics.jsonl", "\n".join(line for line in lines if '"val"' not in line))
    assert "never evaluated during training" in Page(write_report(run)).text


def test_predictions_may_be_images(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", images=True, points=0)
    page = Page(write_report(run))
    streams = json.loads((run / "metrics.json").read_text())["streams"]
    best = min(("rgb", "depth"), key=lambda name: streams[name]["fid"])
    assert f"against the best single stream, {best}; lower" in page.text
    assert "lower is better" in page.text
    assert "of the range off" in page.text
    assert "no figures by class" in page.text


def test_page_of_six_samples_is_light(tmp_path: Path) -> None:
    path = write_report(fake_run(tmp_path / "run", samples=6, size=(468, 625), points=0))
    assert path.stat().st_size < 3_000_000


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
        ("metrics.jsonl", '{"step": 1, "split": "val"}\n{"step": 2, "sp', "line 2"),
        ("metrics.jsonl", "[1]\n", "line 1"),
        ("samples/index.json", '{"ids": 3}', "key ids"),
        ("samples/index.json", '{"ids": ["../0000"]}', "leads out of the folder"),
        ("samples/index.json", '{"ids": [], "classes": [{"name": "a", "color": [0, 0, 256]}]}', "classes.0.color"),
        ("samples/0000.npz", "damaged", "is damaged"),
        ("samples/0000.npz", None, "missing"),
    ],
)
def test_damage_names_the_file_in_one_line(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    run = fake_run(tmp_path / "run", points=3, size=(48, 64))
    (run / name).unlink()
    if text is not None:
        damage(run / name, text)
    wanted = "not a run folder" if (name, text) == ("recipe.yaml", None) else said
    with pytest.raises(UserError, match=re.escape(wanted)) as caught:
        write_report(run)
    assert str(run / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (run / "report.html").exists()


def test_truncated_sample_names_the_file(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", points=0)
    path = run / "samples" / "0000.npz"
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(UserError, match=r"0000\.npz"):
        write_report(run)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("scores/stage1.0", np.zeros((3, 4, 4), np.float16), "3 streams"),
        ("scores/stage1.0", np.full((2, 4, 4), 2, np.float16), "leave 0..1"),
        ("input/rgb", np.zeros((8, 8), np.float32), "float32"),
        ("target", np.full((120, 160), 77, np.uint8), "class id 77"),
        ("target", np.zeros((2, 2), np.uint8), "differ in shape"),
    ],
)
def test_wrong_arrays_name_the_file(tmp_path: Path, key: str, value: NDArray[Any], said: str) -> None:
    run = fake_run(tmp_path / "run", points=0)
    path = run / "samples" / "0000.npz"
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez(path, **(arrays | {key: value}))
    with pytest.raises(UserError, match=said) as caught:
        write_report(run)
    assert str(path) in str(caught.value)


def test_not_a_run_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match="is not a run folder"):
            write_report(path)


def test_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", samples=0, points=0)
    (run / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html: cannot be written"):
        write_report(run)
    assert not list(run.glob(".*"))


def test_comparison_marks_the_best_and_lists_what_differs(tmp_path: Path) -> None:
    runs = [
        fake_run(tmp_path / "token", samples=0, points=8),
        fake_run(tmp_path / "late", fuser="none", samples=0, seed=3, points=8),
        fake_run(tmp_path / "rgb", modalities=("rgb",), fuser="none", samples=0, seed=4, points=8),
    ]
    page = Page(write_comparison(runs, tmp_path / "out" / "compare.html"))
    values = [json.loads((run / "metrics.json").read_text())["streams"].get("ensemble", {}).get("miou") for run in runs]
    best = runs[max((0, 1), key=lambda place: values[place])].name
    assert f"{best} best ensemble" in page.text
    assert page.text.count("best ensemble") == 1
    assert all(f"{value:.1f}" in page.text for value in values[:2])
    keys = page.text.split("What differs in the recipes")[1]
    assert "data.modalities" in keys
    assert "seed" in keys
    assert "fuser.rule" in keys
    assert "batch_size" not in keys
    assert "data.root" not in keys
    assert all(source.startswith("data:image/") for source in page.loaded)
    assert len(page.loaded) == 2


def test_comparison_warns_of_different_protocols(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / name, samples=0, points=3) for name in ("a", "b")]
    evaluation = json.loads((runs[1] / "metrics.json").read_text()) | {"protocol": "flip", "parameters": 44_000_000}
    damage(runs[1] / "metrics.json", json.dumps(evaluation))
    text = Page(write_comparison(runs, tmp_path)).text
    assert "different protocols" in text
    assert "different splits" not in text
    assert "44,000,000" in text
    assert "The recipes are the same" in text


def test_comparison_of_incomplete_and_namesake_runs(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder / "run").mkdir(parents=True)
        damage(tmp_path / folder / "run" / "recipe.yaml", f"seed: {folder}\n")
    path = write_comparison([tmp_path / "a" / "run", tmp_path / "b" / "run"], tmp_path)
    assert path == tmp_path / "compare.html"
    text = Page(path).text
    assert "Not evaluated yet: a/run, b/run" in text
    assert "without a curve: a/run, b/run" in text
    with pytest.raises(UserError, match="nothing to compare"):
        write_comparison([], tmp_path)
