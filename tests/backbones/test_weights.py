"""Published checkpoints: every layout read, nothing executed, every damage a user's message."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_rules import Case
from safetensors.torch import save_file

from tokenfusion.backbones.fused import FusedBackbone
from tokenfusion.backbones.keys import from_hf_segformer, from_mit, from_released_segmentation, from_segformer
from tokenfusion.backbones.weights import fetch, load_into, read_checkpoint
from tokenfusion.errors import UserError
from tokenfusion.fusion import NoFusion, TokenFusion

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1)}


# ---- read_checkpoint -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrapped",
    [
        TENSORS,
        {"state_dict": TENSORS, "epoch": 3},
        {"model": TENSORS},
        {"module." + key: value for key, value in TENSORS.items()},
        {"segmenter": {"module." + key: value for key, value in TENSORS.items()}, "epoch_start": 7, "best_val": 0.5},
    ],
    ids=["plain", "state_dict", "model", "data-parallel", "released"],
)
@pytest.mark.parametrize("name", ["x.pth", "x.pth.tar", "x.pt", "x.bin"])
def test_torch_files_in_every_wrapping(tmp_path: Path, wrapped: dict, name: str) -> None:
    torch.save(wrapped, tmp_path / name)
    content = read_checkpoint(tmp_path / name)
    assert list(content) == list(TENSORS)
    assert all(torch.equal(content[key], value) for key, value in TENSORS.items())


@pytest.mark.parametrize("best", [np.float64(54.8), np.float32(54.8), np.int64(54)], ids=lambda value: value.dtype.name)
def test_released_files_may_hold_a_numpy_figure(tmp_path: Path, best: np.generic) -> None:
    """A metric computed with numpy is stored as its scalar: harmless, and no reason to refuse the weights."""
    torch.save({"segmenter": {"module.a": torch.ones(2)}, "epoch_start": 3, "best_val": best}, tmp_path / "x.pth.tar")
    assert list(read_checkpoint(tmp_path / "x.pth.tar")) == ["a"]


def test_old_torch_format(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert list(read_checkpoint(tmp_path / "old.pth")) == list(TENSORS)


def test_safetensors_and_folders(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        assert set(read_checkpoint(path)) == set(TENSORS)


def test_safetensors_are_preferred_in_a_folder(tmp_path: Path) -> None:
    save_file({"new": torch.ones(1)}, tmp_path / "model.safetensors")
    torch.save({"old": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert list(read_checkpoint(tmp_path)) == ["new"]


def message(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    text = str(caught.value)
    assert "\n" not in text
    assert "\x1b" not in text, "no terminal colours in a message"
    assert str(path) in text
    return text


def test_missing_and_empty_places(tmp_path: Path) -> None:
    assert "no such checkpoint file" in message(tmp_path / "nowhere.pth")
    assert "model.safetensors" in message(tmp_path)
    torch.save({"epoch": 3}, tmp_path / "x.pth")
    assert "no tensors" in message(tmp_path / "x.pth")
    torch.save(torch.ones(3), tmp_path / "y.pth")
    assert "no tensors" in message(tmp_path / "y.pth")


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("layout", ["zip", "old", "pickle"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, layout: str) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    content = {"state_dict": {"a": torch.ones(2)}, "extra": Evil(trace)}
    if layout == "pickle":
        path.write_bytes(pickle.dumps({"extra": Evil(trace)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
    text = message(path)
    assert not trace.exists()
    assert "weights_only" not in text, "a user has no such option, and is not to be taught to look for it"


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "old.pth"])
def test_every_truncation_is_a_users_message(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "x.safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=name != "old.pth")
    content = path.read_bytes()
    for length in sorted({0, 1, 4, 8, 9, *range(16, len(content), max(1, len(content) // 25)), len(content) - 1}):
        path.write_bytes(content[:length])
        message(path)


@pytest.mark.parametrize(
    "content", [b"hello world\n" * 9, b"\x80\x02}q\x00.", b"PK\x03\x04 no archive", bytes(range(256)) * 4]
)
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_other_files_are_a_users_message(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    message(tmp_path / name)


@pytest.mark.parametrize("name", ["no-such-thing", "a/b/c", "https://host/x"])
def test_fetch_names_what_is_neither_a_path_nor_a_hub_id(name: str) -> None:
    with pytest.raises(UserError, match=re.escape(name) + ".*hub id such as"):
        fetch(name)


def test_fetch_reads_a_local_path(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "x.pth")
    assert list(fetch(str(tmp_path / "x.pth"))) == list(TENSORS)


def _hub(monkeypatch: pytest.MonkeyPatch, holds: Path | None) -> list[str]:
    """A hub that holds the files of a folder, or is out of reach; what was asked of it."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked: list[str] = []

    def download(repo: str, allow_patterns: str) -> str:
        asked.append(f"{repo}/{allow_patterns}")
        if holds is None:
            raise RuntimeError("no way to the hub\nRequest id 1")
        return str(holds)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_fetch_takes_what_the_hub_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    asked = _hub(monkeypatch, tmp_path)
    assert list(fetch("someone/mit-b2")) == list(TENSORS)
    assert asked[0] == "someone/mit-b2/model.safetensors"


def test_fetch_without_a_hub_says_so_in_one_line_and_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _hub(monkeypatch, None)
    with pytest.raises(UserError, match=r"^someone/mit-b2: could not be fetched .*no way to the hub\); .*local path$"):
        fetch("someone/mit-b2")
    assert len(asked) == 1


def test_fetch_of_what_holds_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _hub(monkeypatch, tmp_path)
    with pytest.raises(UserError, match=r"^someone/mit-b2: the hub holds none of model\.safetensors, .* there; give"):
        fetch("someone/mit-b2")


@pytest.mark.parametrize("name", ["weights/mit_b2.pth", "runs/model.safetensors", "x/y.pth.tar", "x/y.bin"])
def test_a_mistyped_local_file_is_not_looked_up_on_the_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked = _hub(monkeypatch, None)
    with pytest.raises(UserError, match=re.escape(name)):
        fetch(name)
    assert not asked


# ---- key maps ------------------------------------------------------------------------------------------------------


def to_original(name: str) -> str:
    """Our MiT name to that of the original mit_b*.pth, written independently of the key map."""
    parts = name.split(".")
    stage = int(parts[1]) + 1
    if parts[2] == "embed":
        return ".".join([f"patch_embed{stage}", *parts[3:]])
    if parts[2] == "norm":
        return ".".join([f"norm{stage}", *parts[3:]])
    inner = ["attn" if part == "attention" else part for part in parts[4:]]
    if "dwconv" in inner:
        inner.insert(inner.index("dwconv"), "dwconv")
    return ".".join([f"block{stage}", parts[3], *inner])


def test_original_mit_files(small_mit, shake, tmp_path: Path) -> None:
    source, mine = shake(small_mit()).eval(), small_mit().eval()
    original = {to_original(name): value for name, value in source.state_dict().items()}
    assert {
        "patch_embed1.proj.weight",
        "block2.1.attn.kv.bias",
        "block1.0.mlp.dwconv.dwconv.weight",
        "norm4.bias",
    } <= set(original)
    torch.save({**original, "head.weight": torch.ones(9, 32), "head.bias": torch.ones(9)}, tmp_path / "mit_b0.pth")
    mapped = from_mit(read_checkpoint(tmp_path / "mit_b0.pth"))
    assert mapped.keys() == from_segformer(original).keys()
    report = load_into(mine, mapped)
    assert not report.random
    assert not report.unused
    image = torch.randn(1, 3, 64, 64)
    for a, b in zip(mine(image), source(image), strict=True):
        assert torch.equal(a, b)


def test_our_own_names_pass_through(small_mit) -> None:
    source = small_mit().state_dict()
    assert from_mit(source) == source


def test_hugging_face_layout_with_and_without_the_task_prefix() -> None:
    source = {
        "encoder.patch_embeddings.1.layer_norm.weight": torch.ones(2),
        "encoder.block.1.0.attention.self.key.weight": torch.full((2, 2), 1.0),
        "encoder.block.1.0.attention.self.value.weight": torch.full((2, 2), 2.0),
        "encoder.layer_norm.3.bias": torch.ones(2),
    }
    expected = {"stages.1.embed.norm.weight", "stages.1.blocks.0.attention.kv.weight", "stages.3.norm.bias"}
    for prefix in ("", "segformer."):
        mapped = from_hf_segformer({prefix + key: value for key, value in source.items()})
        assert set(mapped) == expected
        kv = mapped["stages.1.blocks.0.attention.kv.weight"]
        assert kv.tolist() == [[1, 1], [1, 1], [2, 2], [2, 2]]
    assert "decode_head.classifier.weight" in from_hf_segformer({"decode_head.classifier.weight": torch.ones(1)})


def test_an_unknown_layout_is_named() -> None:
    with pytest.raises(UserError, match=r"'layer1.weight'.*patch_embed1"):
        from_mit({"layer1.weight": torch.ones(1)})
    with pytest.raises(UserError, match=r"'encoder2.x' is not part"):
        from_released_segmentation({"encoder2.x": torch.ones(1)})


def test_released_segmentation_names_are_ours_one_to_one() -> None:
    """Against every key of the published layout (tests/golden)."""
    released = json.loads((Case("seg_mit_b0").folder / "keys.json").read_text())
    names = {key: next(iter(from_released_segmentation({key: torch.zeros(1, 1)}))) for key in released}
    assert len(set(names.values())) == len(released) == 333
    assert names["alpha"] == "ensemble.alpha"
    assert names["encoder.block3.1.attn.norm.ln_1.bias"] == "backbone.backbone.stages.2.blocks.1.attention.norm.1.bias"
    assert names["encoder.score_predictor.2.score_nets.1.7.weight"] == "backbone.fusers.2.0.score.nets.1.7.weight"
    assert names["decoder.linear_fuse.bn.running_var"] == "head.norm.running_var"


# ---- load_into -----------------------------------------------------------------------------------------------------


def test_a_single_modal_checkpoint_fills_every_private_copy(small_mit, shake, images) -> None:
    single = shake(small_mit()).eval()
    fused = FusedBackbone(small_mit(), ["rgb", "depth", "thermal"], NoFusion).eval()
    report = load_into(fused.backbone, single.state_dict())
    assert not report.random
    assert not report.unused
    norms = sum("norm" in name for name in single.state_dict())
    assert len(report.copied) == 3 * norms
    assert len(report.loaded) == len(single.state_dict()) - norms
    x = images(3)
    for m, name in enumerate(x):
        for a, b in zip(fused(x).maps, single(x[name]), strict=True):
            torch.testing.assert_close(a[m], b, rtol=1e-5, atol=1e-5)


def test_private_copies_of_the_very_same_network_stay_their_own(small_mit, shake) -> None:
    fused = shake(FusedBackbone(small_mit(), ["rgb", "depth"], TokenFusion))
    other = FusedBackbone(small_mit(), ["rgb", "depth"], TokenFusion)
    report = load_into(other, fused.state_dict())
    assert not report.copied
    assert not report.random
    assert all(torch.equal(value, fused.state_dict()[name]) for name, value in other.state_dict().items())


def test_report_tells_what_stayed_random_and_what_nobody_asked_for(small_mit) -> None:
    fused = FusedBackbone(small_mit(), ["rgb", "depth"], TokenFusion)
    source = {f"backbone.{name}": value for name, value in small_mit().state_dict().items()}
    report = load_into(fused, {**source, "decode_head.classifier.weight": torch.ones(1)})
    assert report.random
    assert all(name.startswith("fusers.") for name in report.random)
    assert report.unused == ["decode_head.classifier.weight"]
    summary = report.summary("nvidia/mit-b0")
    assert summary.startswith("weights from nvidia/mit-b0: ")
    assert "left random: fusers.0, fusers.1, fusers.2, fusers.3" in summary
    assert "unused: decode_head.classifier" in summary
    for names in report:
        assert names == sorted(names), "as LoadReport says"


def test_another_shape_is_named_and_nothing_is_changed(small_mit) -> None:
    network = small_mit()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    source = {name: value + 1 for name, value in before.items()}
    source["stages.3.norm.weight"] = torch.ones(7)
    with pytest.raises(UserError, match=r"stages.3.norm.weight.*\(7,\).*\(32,\)"):
        load_into(network, source)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_checkpoint_of_something_else_is_refused(small_mit) -> None:
    with pytest.raises(UserError, match=r"nothing .*fits.*'layer1.weight'"):
        load_into(small_mit(), {"layer1.weight": torch.ones(1)})


def test_other_precisions_are_converted(small_mit) -> None:
    network = small_mit()
    load_into(network, {name: value.double() for name, value in small_mit().state_dict().items()})
    assert {p.dtype for p in network.parameters()} == {torch.float32}
