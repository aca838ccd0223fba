"""What is shown of a sample: its pictures, their captions, and what is said of damaged files."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from report.fake import fake_run
from report.fake_detection import fake_detection
from report.fake_translation import fake_translation

from tokenfusion.errors import UserError
from tokenfusion.report import maps
from tokenfusion.report.run import Run, read_run
from tokenfusion.report.samples import MAP_SIDE, SIDE, sample


def change(run: Run, arrays: dict[str, NDArray[Any]], without: str = "") -> None:
    """Put other arrays into the first sample; ``without`` takes those out whose name starts so."""
    path = run.path / "samples" / "0000.npz"
    with np.load(path) as archive:
        kept = {name: archive[name] for name in archive.files if not (without and name.startswith(without))}
    np.savez(path, **(kept | arrays))


def captions(found: dict[str, Any]) -> list[str]:
    return [f"{item.caption}, {item.note}" if item.note else item.caption for item in found["pictures"]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run of one small sample, to be changed."""
    return read_run(fake_run(tmp_path / "run", size=(48, 64), points=0))


def test_streams_are_columns(run: Run) -> None:
    found = sample(run, "0000")
    assert {(item.caption, item.column, item.row) for item in found["pictures"]} == {
        ("rgb", 1, 1), ("depth", 2, 1), ("target", 3, 1),
        ("rgb: prediction", 1, 2), ("depth: prediction", 2, 2), ("ensemble: prediction", 3, 2),
        ("rgb: errors", 1, 3), ("depth: errors", 2, 3), ("ensemble: errors", 3, 3),
    }  # fmt: skip
    assert found["columns"] == 3
    with np.load(run.path / "samples" / "0000.npz") as archive:
        target, prediction = archive["target"], archive["prediction/depth"]
    wrong = 100 * (prediction != target)[target != 255].mean()
    assert f"depth: errors, {wrong:.1f} % wrong" in captions(found)
    named = dict(found["legend"])
    assert named["wall"] == "#aec7e8"
    assert named["not counted"] == "#282828"
    assert len(named) == len(np.unique(target))


def test_labels_keep_their_colours_and_large_pictures_shrink(tmp_path: Path) -> None:
    run = read_run(fake_run(tmp_path / "run", size=(300, 400), points=0))
    found = sample(run, "0000")
    pictures = {item.caption: Image.open(io.BytesIO(item.data)) for item in found["pictures"]}
    colours = {tuple(colour) for colour in np.asarray(pictures["target"]).reshape(-1, 3).tolist()}
    assert colours <= {tuple(colour) for colour in [*run.samples.palette().tolist(), list(maps.IGNORED)]}
    assert pictures["rgb"].size == (SIDE, SIDE * 3 // 4)
    exchanged = Image.open(io.BytesIO(found["streams"][0][1][0].pictures[0].data))
    assert exchanged.size == (MAP_SIDE, MAP_SIDE * 3 // 4)


def test_maps_of_exchanged_tokens_state_their_share(run: Run) -> None:
    with np.load(run.path / "samples" / "0000.npz") as archive:
        exchanged = archive["scores/stage2.1"].astype(np.float32) < np.float32(0.02)
    found = sample(run, "0000")
    both = exchanged.all(axis=0).sum()
    for stream, (_, bands) in zip(exchanged, found["streams"], strict=True):
        note = next(item.note for item in bands[0].pictures if item.caption == "stage2.1")
        assert note == f"{100 * stream.mean():.0f} %, {100 * both / stream.sum():.0f} % of them blue"
    blocks = ["stage1.0", "stage1.1", "stage2.0", "stage2.1", "stage3.0", "stage3.2", "stage4.0", "stage4.1"]
    for _, bands in found["streams"]:
        assert [sorted(item.caption for item in band.pictures) for band in bands] == [blocks]


def test_where_nothing_was_exchanged_the_lowest_score_is_told(run: Run) -> None:
    scores = {f"scores/{block}": np.full((2, 4, 4), 0.5, np.float16) for block in run.samples.blocks}
    change(run, scores | {"scores/stage3.1": np.full((2, 4, 4), 0.25, np.float16)})
    found = sample(run, "0000")
    assert (found["streams"], found["lowest"]) == ([], 0.25)


def test_three_streams_leave_the_stand_in_out(tmp_path: Path) -> None:
    run = read_run(fake_run(tmp_path / "run", modalities=("rgb", "depth", "normal"), size=(48, 64), points=0))
    found = sample(run, "0000")
    assert [name for name, _ in found["streams"]] == ["rgb", "depth", "normal"]
    assert not found["below"]
    assert not any("blue" in item.note for _, (band,) in found["streams"] for item in band.pictures)


def test_fuser_without_scores_has_no_maps(tmp_path: Path) -> None:
    found = sample(read_run(fake_run(tmp_path / "run", fuser="concat", size=(48, 64), points=0)), "0000")
    assert (found["streams"], found["lowest"]) == ([], None)


def test_single_stream_stands_in_one_row_without_its_ensemble(tmp_path: Path) -> None:
    run = read_run(fake_run(tmp_path / "run", modalities=("rgb",), fuser="none", size=(48, 64), points=0))
    change(run, {"prediction/ensemble": np.zeros((48, 64), np.uint8)})
    found = sample(run, "0000")
    assert [item.caption for item in found["pictures"]] == ["rgb", "target", "rgb: prediction", "rgb: errors"]
    assert [item.column for item in found["pictures"]] == [1, 2, 3, 4]
    assert {item.row for item in found["pictures"]} == {1}


def test_translation_shows_truth_predictions_and_errors_as_images(tmp_path: Path) -> None:
    run = read_run(fake_translation(tmp_path / "run", size=(48, 64), points=0))
    found = sample(run, "0000")
    assert {(item.caption, item.column, item.row) for item in found["pictures"]} == {
        ("shade", 1, 1), ("edge_texture", 2, 1), ("normal: truth", 3, 1),
        ("shade: prediction", 1, 2), ("edge_texture: prediction", 2, 2), ("ensemble: prediction", 3, 2),
        ("shade: errors", 1, 3), ("edge_texture: errors", 2, 3), ("ensemble: errors", 3, 3),
    }  # fmt: skip
    with np.load(run.path / "samples" / "0000.npz") as archive:
        difference = np.abs(archive["prediction/shade"].astype(float) - archive["target"]).mean() / 255
    assert f"shade: errors, colours {100 * difference:.1f} % off" in captions(found)
    assert found["legend"] == []
    assert found["shaded"]


def test_blocks_of_nine_stages_stand_in_two_bands(tmp_path: Path) -> None:
    run = read_run(fake_translation(tmp_path / "run", every=True, size=(64, 64), points=0))
    found = sample(run, "0000")
    for _, (encoder, decoder) in found["streams"]:
        assert {(item.column, item.row) for item in encoder.pictures} == {(c, r) for c in range(1, 6) for r in (1, 2)}
        assert [item.caption for item in decoder.pictures][:2] == ["dec1.0", "dec1.1"]
        assert not encoder.single
    assert found["stages"] == 5
    last = sample(read_run(fake_translation(tmp_path / "last", size=(64, 64), points=0)), "0000")
    assert [band.single for _, bands in last["streams"] for band in bands] == [True, True]


def test_small_pictures_are_crisp_and_their_maps_are_enlarged(run: Run, tmp_path: Path) -> None:
    found = sample(run, "0000")
    assert all(item.crisp for item in found["pictures"])
    assert Image.open(io.BytesIO(found["streams"][0][1][0].pictures[0].data)).size == (256, 192)
    large = sample(read_run(fake_run(tmp_path / "large", size=(200, 260), points=0)), "0000")
    assert not any(item.crisp for item in large["pictures"])


def test_finished_pictures_keep_their_size_and_sharp_lines(tmp_path: Path) -> None:
    run = read_run(fake_detection(tmp_path / "run", points=0))
    found = sample(run, "0000")
    assert captions(found) == ["from above", "in the image"]
    assert (found["grid"], found["legend"], found["streams"]) == ("gallery", [], [])
    for picture in found["pictures"]:
        assert Image.open(io.BytesIO(picture.data)).size == (640, 480)
    with np.load(tmp_path / "run" / "samples" / "0000.npz") as drawn:
        plan = np.asarray(Image.open(io.BytesIO(found["pictures"][0].data)))
        np.testing.assert_array_equal(plan, drawn["picture/from above"])  # flat colours: without loss
        assert found["pictures"][1].data.startswith(b"\xff\xd8")  # a photograph: far smaller as JPEG
        change(run, {"picture/in the image": drawn["picture/in the image"][..., 0]})
    with pytest.raises(UserError, match=r"0000\.npz: .*eval"):
        sample(run, "0000")


def test_sample_without_target_has_no_errors(run: Run) -> None:
    change(run, {}, without="target")
    found = sample(run, "0000")
    assert not found["has_target"]
    assert not any("errors" in caption for caption in captions(found))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("scores/stage1.0", np.zeros((3, 4, 4), np.float16), "3 streams"),
        ("scores/stage1.0", np.full((2, 4, 4), 2, np.float16), "leave 0..1"),
        ("input/rgb", np.zeros((8, 8), np.float32), "float32"),
        ("target", np.full((48, 64), 77, np.uint8), "class id 77"),
        ("target", np.zeros((2, 2), np.uint8), "differ in shape"),
    ],
)
def test_wrong_arrays_name_the_file(run: Run, key: str, value: NDArray[Any], said: str) -> None:
    change(run, {key: value})
    with pytest.raises(UserError, match=said) as caught:
        sample(run, "0000")
    assert str(run.path / "samples" / "0000.npz") in str(caught.value)


def test_damaged_and_missing_files_are_named_in_one_line(run: Run) -> None:
    path = run.path / "samples" / "0000.npz"
    whole = path.read_bytes()
    for data, said in ((whole[:-4000], "is damaged"), (b"damaged", "is damaged"), (None, "is missing")):
        path.unlink() if data is None else path.write_bytes(data)
        with pytest.raises(UserError, match=rf"{re.escape(str(path))}: .*{said}") as caught:
            sample(run, "0000")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../0000", "/0000"])
def test_id_that_leads_out_of_the_folder_is_refused(run: Run, name: str) -> None:
    with pytest.raises(UserError, match=r"index\.json.*leads out of the folder"):
        sample(run, name)
