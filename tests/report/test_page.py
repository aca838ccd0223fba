"""The report, written for run folders that the tests draw themselves; charts are costly, so most have none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report.fake import Page, damage, fake_run
from report.fake_detection import COLOURS, HEADS, fake_detection
from report.fake_translation import fake_translation

from tokenfusion.errors import UserError
from tokenfusion.report import write_report
from tokenfusion.report.page import _in_order, _losses

SMALL = (48, 64)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a whole run, written once; only read it."""
    return write_report(fake_run(tmp_path_factory.mktemp("full") / "run", points=4, size=SMALL))


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


def test_headline_compares_the_ensemble_with_the_best_stream(full: Path) -> None:
    streams = json.loads((full.parent / "metrics.json").read_text())["streams"]
    best = max(("rgb", "depth"), key=lambda name: streams[name]["miou"])
    text = Page(full).text
    assert f"{streams['ensemble']['miou'] - streams[best]['miou']:+.1f} against the best single stream, {best}" in text
    for row in streams.values():
        assert " ".join(f"{row[name]:.1f}" for name in ("miou", "pixel_accuracy", "mean_accuracy")) in text
    assert "TokenFusion (rule released, threshold 0.02)" in text


def test_report_shows_its_charts_and_maps(full: Path) -> None:
    page = Page(full)
    charts = {"mIoU by stream, validation", "Loss by term", "Learning rate", "At the end, in percent",
              "rgb, over training", "depth, over training", "IoU by class"}  # fmt: skip
    assert charts <= set(page.captions)
    assert sum("stage" in caption for caption in page.captions) == 2 * 8
    assert "below the threshold of 0.02 is substituted" in page.text


def test_names_are_escaped(full: Path, tmp_path: Path) -> None:
    page = Page(full)
    assert "<b>&" not in page.html
    assert 'a "box" <b>&' in page.text
    damage(tmp_path / "recipe.yaml", "fuser: <script>alert(1)</script>\n")
    page = Page(write_report(tmp_path))
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text


def test_report_is_a_function_of_the_run(tmp_path: Path) -> None:
    run = fake_translation(tmp_path / "run", fuser="concat", points=0, size=SMALL)
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


@pytest.fixture(scope="module")
def translation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a whole translation run, written once; only read it."""
    path = tmp_path_factory.mktemp("translation") / "run"
    return write_report(fake_translation(path, every=True, points=8, size=(64, 64)))


def test_translation_is_ranked_by_its_primary_figure(translation: Path) -> None:
    streams = json.loads((translation.parent / "metrics.json").read_text())["streams"]
    text = Page(translation).text
    best = min(("shade", "edge_texture"), key=lambda name: streams[name]["mae"])
    difference = streams["ensemble"]["mae"] - streams[best]["mae"]
    assert f"{difference:+.4f} against the best single stream, {best}; lower is better" in text
    assert "Stream MAE MSE Mean angle, ° Contrast Diversity" in text
    row = streams["ensemble"]
    assert f"ensemble {row['mae']:.4f} {row['mse']:.4f} {row['angle_deg']:.2f} {row['contrast']:.2f}" in text
    assert "Target normal" in text


def test_translation_page_has_no_word_of_segmentation(translation: Path) -> None:
    page = Page(translation)
    assert "IoU" not in page.text
    assert "Classes" not in page.text
    assert "classes" not in page.ids
    assert "collapsed" not in page.text
    assert all(link[1:] in page.ids for link in page.links)


def test_translation_shows_a_loss_chart_for_each_phase(translation: Path) -> None:
    page = Page(translation)
    charts = {"MAE by stream, validation; lower is better", "Discriminator loss by term", "Generator loss by term",
              "Learning rate", "At the end, in percent"}  # fmt: skip
    assert charts <= set(page.captions)
    assert "Loss by term" not in page.captions
    assert sum(caption.startswith(("enc", "dec")) for caption in page.captions) == 2 * 18
    assert "how far the colours shown differ, mean over the channels" in page.text


@pytest.fixture(scope="module")
def detection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a whole detection run, written once; only read it."""
    return write_report(fake_detection(tmp_path_factory.mktemp("detection") / "run", points=8))


def test_detection_is_ranked_by_its_last_head(detection: Path) -> None:
    page = Page(detection)
    assert "42.0 % mAP@0.25 of the last head" in page.text.replace("\N{THIN SPACE}", " ")
    assert "Head mAP@0.25, % mAP@0.50, % AR@0.25, % AR@0.50, %" in page.text
    for at, head in enumerate(HEADS):
        assert f"{head} {40 + at}.0 {20 + at}.0 {80 + at}.0 {50 + at}.0" in page.text
    assert page.html.count('<tr class="strong"><th scope="row">last</th>') == page.html.count('class="strong"') == 1
    assert "val · 100 scenes" in page.text
    assert "true sizes, batch 1, fp32; trained with exact sizes" in page.text


def test_detection_page_has_no_word_of_other_tasks(detection: Path) -> None:
    text = Page(detection).text.lower()
    for word in ("segment", "ensemble", "miou", "iou by class", "stream", "errors", "kept", "pixel"):
        assert word not in text.replace("every box that was kept", ""), word


def test_detection_shows_curves_boxes_and_what_was_exchanged(detection: Path) -> None:
    page = Page(detection)
    losses = [
        "mAP@0.25 by head, validation",
        "Image loss by term",
        "Points loss by term",
        "Sparsity, and the whole loss",
    ]
    assert [caption for caption in page.captions if "loss" in caption or "head" in caption] == losses
    assert {"At the end, in percent", "points, over training", "from above", "in the image"} <= set(page.captions)
    assert "orange points are those whose token came from the image" in page.text
    assert "those whose objectness is below 0.3 are not drawn" in page.text
    assert "Likewise" not in page.text
    assert "gallery" in page.html.split("<h2>Samples")[1]  # pictures as wide as half of the page
    assert "Class AP@0.25, % Recall@0.25, % AP@0.50, % Recall@0.50, %" in page.text
    assert page.text.index("table 70.0 85.0 30.0 60.0") < page.text.index("sofa 10.0 55.0 5.0 45.0")
    assert "lamp – – – –" in page.text
    assert all("#" + bytes(colour).hex() in page.html for colour in COLOURS)


@pytest.mark.parametrize(("images", "fuser", "said"), [
    (False, "none", "a single stream, so there is nothing to exchange"),
    (True, "none", "its fuser substitutes no tokens"),
    (True, "concat", "This fuser scores no tokens, so no points are marked"),
])  # fmt: skip
def test_detection_without_exchange_says_so(tmp_path: Path, images: bool, fuser: str, said: str) -> None:
    text = Page(write_report(fake_detection(tmp_path / "run", images, fuser, points=0))).text
    assert said in text
    assert "orange" not in text
    assert "no points are marked" not in text or images


def test_detection_of_both_directions_has_a_column_for_each(tmp_path: Path) -> None:
    page = Page(write_report(fake_detection(tmp_path / "run", both=True, samples=0, points=2)))
    assert {"points, over training", "rgb, over training"} <= set(page.captions)
    assert "Likewise the images' patches take in" in page.text


def test_streams_keep_their_colours_in_the_losses_of_a_phase() -> None:
    names = ["generator/adversarial", "generator/l1/a", "generator/l1/ensemble", "generator/total", "discriminator/a"]
    found = dict(_losses({name: ([1], [1.0]) for name in names}))
    assert list(found) == ["Discriminator loss by term", "Generator loss by term"]
    assert list(found["Generator loss by term"]) == ["l1 a", "l1 ensemble", "adversarial", "total"]
    assert list(found["Discriminator loss by term"]) == ["a"]


def test_decoder_follows_its_encoder() -> None:
    blocks = dict.fromkeys(("dec1.10", "dec1.9", "enc2.0", "enc1.3"), 0)
    assert list(_in_order(blocks)) == ["enc1.3", "enc2.0", "dec1.9", "dec1.10"]


def test_features_and_three_streams(tmp_path: Path) -> None:
    streams = ("shade", "depth", "normal")
    run = fake_translation(tmp_path / "run", streams, "rgb", features="dinov2-vits14", points=0, size=SMALL)
    figures = json.loads((run / "metrics.json").read_text())["streams"]
    page = Page(write_report(run))
    best = min(streams, key=lambda name: figures[name]["fid"])
    assert f"against the best single stream, {best}; lower is better" in page.text
    assert "Stream FID KID ×100 ± sd MAE" in page.text
    assert "on dinov2-vits14" in page.text
    assert "do not tell which stream stood in" in page.text
    assert "The rates over training were not logged" in page.text


def test_collapsed_generator_is_a_warning_and_no_rival(tmp_path: Path) -> None:
    run = fake_translation(tmp_path / "run", fuser="none", collapsed=("shade", "ensemble"), points=0, size=SMALL)
    text = Page(write_report(run)).text
    warning = "The images made by shade and ensemble have collapsed: they are constant, or the same whatever comes in"
    assert warning in text
    assert text.index(warning) < text.index("ensemble MAE")
    assert "lower train.lr or a larger loss.l1" in text
    assert "against the best single stream, edge_texture" in text


@pytest.mark.parametrize("fuser", ["none", "concat"])
def test_fuser_without_scores_says_so(tmp_path: Path, fuser: str) -> None:
    text = Page(write_report(fake_translation(tmp_path / "run", fuser=fuser, points=0, size=SMALL))).text
    assert "its fuser substitutes no tokens" in text
    assert "this fuser scores no tokens" in text


def test_rates_without_a_threshold_claim_none(tmp_path: Path) -> None:
    damage(tmp_path / "recipe.yaml", "fuser: random\n")
    damage(tmp_path / "metrics.json", '{"exchange": {"stage1.0": {"rgb": 0.5}}}')
    text = Page(write_report(tmp_path)).text
    assert "states no threshold of scores" in text
    assert "a small network gives" not in text


def test_exchange_of_nearly_nothing_is_a_sentence(tmp_path: Path) -> None:
    damage(tmp_path / "recipe.yaml", "fuser: {threshold: 0.02}\n")
    lines = [
        {"step": n, "split": "train", "exchange/stage1.0/rgb": 0.004, "exchange/stage1.0/depth": 0.0} for n in (1, 2)
    ]
    damage(tmp_path / "metrics.jsonl", "\n".join(map(json.dumps, lines)))
    page = Page(write_report(tmp_path))
    assert "less than 0.5 % of the tokens of rgb and of depth were substituted" in page.text
    assert page.captions == ["At the end, in percent"]


def test_single_modality_and_no_samples_are_said(tmp_path: Path) -> None:
    run = fake_translation(tmp_path / "run", modalities=("shade",), fuser="none", samples=0, points=0)
    text = Page(write_report(run)).text
    assert "a single stream, so there is nothing to exchange" in text
    assert "No samples were kept" in text
    assert "against the best single stream" not in text


def test_recipe_alone_is_a_run(tmp_path: Path) -> None:
    damage(tmp_path / "recipe.yaml", "seed: 1\n")
    text = Page(write_report(tmp_path)).text
    for sentence in ("has not been evaluated yet", "no metrics.jsonl", "No samples", "no figures by class"):
        assert sentence in text


@pytest.mark.parametrize(("count", "said"), [(0, "never evaluated during"), (1, "evaluated only once during")])
def test_too_few_evaluations_for_a_curve(tmp_path: Path, count: int, said: str) -> None:
    damage(tmp_path / "recipe.yaml", "seed: 1\n")
    lines = [{"step": 1, "split": "train"}, {"step": 2, "split": "val", "rgb/miou": 43.21}]
    damage(tmp_path / "metrics.jsonl", "\n".join(map(json.dumps, lines[: 1 + count])))
    page = Page(write_report(tmp_path))
    assert said in page.text
    assert page.captions == []
    assert ("Figures of the last evaluation during training" in page.text) == bool(count)
    assert ("43.2" in page.text) == bool(count)


def test_page_is_light(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", size=(468, 625), points=0)
    (run / "metrics.json").unlink()
    assert write_report(run).stat().st_size < 500_000


def test_damage_leaves_no_report(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", points=0, size=SMALL)
    damage(run / "samples" / "0000.npz", "damaged")
    with pytest.raises(UserError, match="is damaged"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    damage(tmp_path / "recipe.yaml", "seed: 1\n")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html: cannot be written"):
        write_report(tmp_path)
    assert not list(tmp_path.glob(".*"))
