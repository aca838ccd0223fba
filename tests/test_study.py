"""A study: which runs it asks for, which of them are done, and the tables that it makes of their figures."""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from scipy import stats

from tokenfusion import api
from tokenfusion.data import Folder
from tokenfusion.errors import UserError
from tokenfusion.recipe import read_recipe
from tokenfusion.study import Wish, plan, read_study, study
from tokenfusion.study import runs as runs_of
from tokenfusion.study.judging import judge, measure
from tokenfusion.study.results import check_judged_alike, figures, is_judged, is_timed
from tokenfusion.study.runs import is_done
from tokenfusion.study.spread import paired, t_quantile
from tokenfusion.study.table import Entry

SCORES = {
    "NoFusion": (49.0, 49.5, 48.0),
    "Concat": (46.0, 46.4, 46.1),
    "Average": (51.0,),
    "TokenFusion": (55.0, 56.5, 53.0),
}


class Trainer:
    """In place of the processes that train and judge: writes the figures of a made-up run."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.judged: list[str] = []
        self.devices: list[str] = []
        self.order: list[str] = []
        self.fails = ""

    def __call__(self, command: list[str], stdout: Any, env: dict[str, str], **_: Any) -> Any:
        module, *words = command[2:]
        self.order.append(module.rpartition(".")[2])
        if words[-1] == "seconds":
            run = Path(words[0])
            step = json.loads((run / "metrics.json").read_text())["step"]
            (run / "seconds.json").write_text(json.dumps({"seconds": 12.0, "of_step": step}))
            return SimpleNamespace(returncode=0)
        if module.endswith("judging"):
            run, conditions = Path(words[0]), json.loads(words[1])
            self.judged.append(run.name)
            (run / "conditions").mkdir(exist_ok=True)
            for title, changes in conditions.items():
                found = {**json.loads((run / "metrics.json").read_text()), "evaluation": changes}
                found["streams"]["ensemble"]["miou"] /= 2
                (run / "conditions" / f"{title.replace(' ', '-')}.json").write_text(json.dumps(found))
            return SimpleNamespace(returncode=0)
        run, recipe = Path(words[-1]), read_recipe(words[1], words[2:-2])
        self.devices.append(env.get("CUDA_VISIBLE_DEVICES", ""))
        if self.fails and self.fails in run.name:
            stdout.write(b"out of luck\n")
            return SimpleNamespace(returncode=1)
        self.trained.append(run.name)
        write_run(run, recipe)
        return SimpleNamespace(returncode=0)


def write_run(run: Path, recipe: Any) -> None:
    """What a finished run leaves, without weights; its score tells fuser and seed."""
    fuser = recipe.fuser["_target_"].rpartition(".")[2]
    score = SCORES[fuser][recipe.seed]
    streams = {name: {"miou": score - 5, "pixel_accuracy": 80.0} for name in recipe.data.modalities}
    content = {
        "task": "segmentation", "dataset": Folder(recipe.data.root).name, "split": "val", "images": 7, "primary": "miou",
        "protocol": "single scale", "checkpoint": "last", "step": recipe.train.steps,
        "streams": {**streams, "ensemble": {"miou": score, "pixel_accuracy": 80.0}},
        "exchange": {"stage1.0": {"rgb": 0.5, "depth": 0.3}} if fuser == "TokenFusion" else {},
    }  # fmt: skip
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.json").write_text(json.dumps(content))
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))


OUTLINE = """
description: three ways
parts:
  rooms:
    scales: {toy: {recipe: toy-segmentation, set: [train.steps=20]}}
    columns: {mIoU: miou, of rgb: rgb/miou, exchanged: exchange, FID: fid}
    plot: exchange
    rows:
      late ensemble: {set: [fuser=none], reference: true, paper: [50, null, null, null]}
      concat: {set: [fuser=concat]}
      TokenFusion: {paper: [53.25, null, null, 7.5]}
"""


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """No process is started."""
    made = Trainer()
    monkeypatch.setattr(runs_of.subprocess, "run", made)
    return made


@pytest.fixture
def outline(tmp_path: Path) -> str:
    file = tmp_path / "mine.yaml"
    file.write_text(OUTLINE)
    return str(file)


def described(folder: Path, name: str) -> str:
    """Data as far as a study looks at them: what they are called, and their ids."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = {
        "name": name,
        "modalities": {"rgb": {"kind": "rgb", "files": "rgb/{id}.png"}},
        "splits": {"val": "val.txt"},
    }
    (folder / "dataset.yaml").write_text(yaml.safe_dump(spec))
    (folder / "val.txt").write_text("0\n")
    return str(folder)


def wish(tmp_path: Path, **changes: Any) -> Wish:
    return Wish(**{"out": tmp_path / "out", "data": described(tmp_path / "somewhere", "rooms"), **changes})


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]


def test_a_study_ends_in_a_table(trainer: Trainer, outline: str, tmp_path: Path) -> None:
    text = study(outline, wish(tmp_path))
    head, late, concat, fused = rows(text)
    assert head == ["method", "mIoU, %", "paper mIoU", "of rgb, %", "exchanged, %", "paper FID",
                    "difference to late ensemble (95 %)", "runs"]  # fmt: skip
    assert late == ["late ensemble", "48.8 ± 0.8", "50.00", "43.8 ± 0.8", "–", "", "", "3"]
    assert concat[:2] == ["concat", "46.2 ± 0.2"]
    interval = stats.ttest_rel(SCORES["TokenFusion"], SCORES["NoFusion"]).confidence_interval(0.95)
    assert fused == ["TokenFusion", "54.8 ± 1.8", "53.25", "49.8 ± 1.8", "40.0 ± 0.0", "7.5",
                     f"+6.0 (+{interval.low:.1f} to +{interval.high:.1f})", "3"]  # fmt: skip
    assert "toy-segmentation, judged on rooms val (7 images) after 20 steps; 3 seeds" in text
    assert "The paper's numbers are of its own data" in text
    data = tmp_path / "somewhere"
    assert f"`tokenfusion study {outline} --scale toy --seeds 3 --data {data} --out {tmp_path / 'out'}`" in text
    assert {path.name for path in (tmp_path / "out" / "rooms").iterdir()} == {
        f"{row}-seed{seed}" for row in ("late-ensemble", "concat", "tokenfusion") for seed in range(3)
    }


def test_figures_are_written_for_programs_too(trainer: Trainer, outline: str, tmp_path: Path) -> None:
    study(outline, wish(tmp_path, seeds=2))
    found = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    chosen = {r["seed"]: r for r in found if (r["row"], r["column"]) == ("TokenFusion", "mIoU")}
    assert {seed: float(r["value"]) for seed, r in chosen.items()} == {
        "0": 55.0, "1": 56.5, "mean": 55.75, "deviation": pytest.approx(statistics.stdev((55.0, 56.5)), abs=1e-5),
        "paper": 53.25,
    }  # fmt: skip
    folder = tmp_path / "out" / "rooms" / "tokenfusion-seed1"
    data = tmp_path / "somewhere"
    command = f"tokenfusion train toy-segmentation train.steps=20 data.root={data} seed=1 --out {folder}"
    assert chosen["1"]["command"] == command == (folder / "command.txt").read_text().strip()
    assert chosen["1"]["figure"] == "miou"
    tex = (tmp_path / "out" / "table.tex").read_text()
    assert r"TokenFusion & 55.8 $\pm$ 1.1 & 53.25 &" in tex
    assert tex.count(r"\toprule") == tex.count(r"\bottomrule") == 1
    assert r"mIoU, \%" in tex


def test_what_is_done_is_not_done_again(trainer: Trainer, outline: str, tmp_path: Path) -> None:
    text = study(outline, wish(tmp_path, seeds=2))
    assert len(trainer.trained) == 6
    trainer.trained.clear()
    assert study(outline, wish(tmp_path, seeds=2)) == text
    elsewhere = described(tmp_path / "elsewhere", "rooms")
    moved = text.replace(f"--data {tmp_path / 'somewhere'}", f"--data {elsewhere}")
    assert study(outline, wish(tmp_path, seeds=2, data=elsewhere)) == moved  # where the data stand is no other run
    assert trainer.trained == []
    study(outline, wish(tmp_path))
    assert sorted(trainer.trained) == ["concat-seed2", "late-ensemble-seed2", "tokenfusion-seed2"]
    trainer.trained.clear()
    study(outline, wish(tmp_path, overrides=("train.lr=1e-3",)))
    assert len(trainer.trained) == 9  # another recipe


def test_what_a_study_beside_it_has_done_is_taken_over(trainer: Trainer, outline: str, tmp_path: Path) -> None:
    study(outline, wish(tmp_path, seeds=1))
    trainer.trained.clear()
    (tmp_path / "other.yaml").write_text(
        OUTLINE.replace("rooms:", "elsewhere:").replace("concat: {set: [fuser=concat]}", "one: {set: [fuser=average]}")
        .replace("TokenFusion: {", "ours: {")
    )  # fmt: skip
    study(str(tmp_path / "other.yaml"), wish(tmp_path, out=tmp_path / "second", seeds=1))
    assert trainer.trained == ["one-seed0"]
    taken = tmp_path / "second" / "elsewhere" / "ours-seed0"
    own = tmp_path / "out" / "rooms" / "tokenfusion-seed0"
    for name in ("metrics.json", "recipe.yaml", "command.txt"):
        assert (taken / name).read_text() == (own / name).read_text()
    trainer.trained.clear()
    conditions = (tmp_path / "other.yaml").read_text() + "    conditions: {dark: {missing: [depth]}}\n"
    (tmp_path / "third.yaml").write_text(conditions)
    study(str(tmp_path / "third.yaml"), wish(tmp_path, out=tmp_path / "third", seeds=1))
    assert len(trainer.trained) == 3, "nobody has judged them under that condition"


def test_a_damaged_folder_beside_it_is_nobodys_business(
    trainer: Trainer, outline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other" / "rooms" / "concat-seed0"
    other.mkdir(parents=True)
    for name in ("recipe.yaml", "metrics.json", "command.txt"):
        (other / name).write_text("{")
    monkeypatch.chdir(tmp_path / "other")
    study(outline, wish(tmp_path, out=Path("."), seeds=1))
    assert len(trainer.trained) == 3


@pytest.mark.parametrize("is_told", [True, False])
def test_figures_of_other_data_are_not_taken_over(
    trainer: Trainer, outline: str, tmp_path: Path, is_told: bool
) -> None:
    """Data of another name; or of the same name, with other ids, which figures tell by a fingerprint."""
    study(outline, wish(tmp_path, seeds=1))
    for file in tmp_path.glob("out/*/*/metrics.json"):
        told = {"data": Folder(tmp_path / "somewhere").fingerprint()} if is_told else {}
        file.write_text(json.dumps({**json.loads(file.read_text()), **told}))
    trainer.trained.clear()
    other = described(tmp_path / "other", "rooms" if is_told else "mine")
    (tmp_path / "other" / "val.txt").write_text("1\n")
    study(outline, wish(tmp_path, out=tmp_path / "second", seeds=1, data=other))
    assert len(trainer.trained) == 3
    study(outline, wish(tmp_path, seeds=1, data=other))
    assert len(trainer.trained) == 3, "what has been trained on these data beside it is taken over"
    trainer.trained.clear()
    with pytest.raises(UserError, match="nowhere"):
        study(outline, wish(tmp_path, out=tmp_path / "third", seeds=1, data=str(tmp_path / "nowhere")))
    assert trainer.trained == []


def test_a_run_of_fewer_steps_does_not_go_on(trainer: Trainer, outline: str, tmp_path: Path) -> None:
    study(outline, wish(tmp_path, seeds=1))
    trainer.trained.clear()
    with pytest.raises(UserError, match="-seed0: is a run of 20 steps, and 30 are asked for; choose another --out"):
        study(outline, wish(tmp_path, seeds=1, overrides=("train.steps=30",)))
    assert trainer.trained == []


def test_tables_of_other_settings_stay(trainer: Trainer, outline: str, tmp_path: Path) -> None:
    study(outline, wish(tmp_path, seeds=1))
    table = tmp_path / "out" / "table.md"
    before = table.read_text()
    with pytest.raises(UserError, match=r"-seed0: is done, and no run of this study at scale toy with these"):
        study(outline, wish(tmp_path, seeds=1, overrides=("train.lr=1e-3",)), train=False)
    trainer.fails = "seed0"
    with pytest.raises(UserError, match="this run failed"):
        study(outline, wish(tmp_path, seeds=1, overrides=("train.lr=1e-3",)))
    assert table.read_text() == before


def test_some_rows_now_and_tables_without_training(trainer: Trainer, outline: str, tmp_path: Path) -> None:
    text = study(outline, wish(tmp_path, rows=("concat",)))
    assert set(trainer.trained) == {"concat-seed0", "concat-seed1", "concat-seed2"}
    _, late, concat, fused = rows(text)
    assert (late[1], concat[1], fused[1]) == ("–", "46.2 ± 0.2", "–")
    assert (late[-1], concat[-1], concat[-2]) == ("0", "3", "")  # nothing to be compared with
    trainer.trained.clear()
    assert rows(study(outline, wish(tmp_path), train=False)) == rows(text)
    assert trainer.trained == []
    with pytest.raises(UserError, match="--rows: there is no row 'concatt'; did you mean 'concat'"):
        study(outline, wish(tmp_path, rows=("concatt",)))


def test_an_empty_study_has_a_table(trainer: Trainer, outline: str, tmp_path: Path) -> None:
    text = study(outline, wish(tmp_path), train=False)
    assert "no run is done yet" in text
    assert rows(text)[3][1:3] == ["–", "53.25"]


def test_a_failed_run_does_not_lose_the_others(trainer: Trainer, outline: str, tmp_path: Path) -> None:
    trainer.fails = "concat-seed1"
    with pytest.raises(UserError, match=r"concat-seed1/train.log: this run failed \(out of luck\)"):
        study(outline, wish(tmp_path))
    assert len(trainer.trained) == 8
    assert rows((tmp_path / "out" / "table.md").read_text())[2][-1] == "2"


def test_every_run_gets_a_device_of_its_own(
    trainer: Trainer, outline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_of.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    study(outline, wish(tmp_path))
    assert len(trainer.devices) == 9
    assert set(trainer.devices) == {"5", "7"}


def test_figures_of_different_protocols_share_no_table(trainer: Trainer, outline: str, tmp_path: Path) -> None:
    study(outline, wish(tmp_path, seeds=1))
    path = tmp_path / "out" / "rooms" / "concat-seed0" / "metrics.json"
    path.write_text(path.read_text().replace('"single scale"', '"multi scale"'))
    with pytest.raises(UserError, match=r"concat-seed0: was judged otherwise \(multi scale\)"):
        study(outline, wish(tmp_path, seeds=1))


def test_figures_of_different_data_share_no_table(trainer: Trainer, outline: str, tmp_path: Path) -> None:
    study(outline, wish(tmp_path, seeds=1))
    for row, told in (("concat", "a"), ("tokenfusion", "b")):  # the first run is an old one and does not tell
        path = tmp_path / "out" / "rooms" / f"{row}-seed0" / "metrics.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "data": told}))
    runs = [tmp_path / "out" / "rooms" / f"{row}-seed0" for row in ("late-ensemble", "concat", "tokenfusion")]
    check_judged_alike(runs[:2])
    with pytest.raises(UserError, match=r"tokenfusion-seed0: was judged otherwise \(b\) than .*concat-seed0 \(a\)"):
        check_judged_alike(runs)


def test_how_many_runs_a_mean_is_of_is_told_where_some_have_no_figure() -> None:
    assert Entry("fid", {0: 10.0, 2: 30.0}, 3).text() == "20.00 ± 14.14 (2 of 3)"
    assert Entry("fid", {0: 10.0, 2: 30.0}, 2).text() == "20.00 ± 14.14"


def test_conditions_are_rows_and_methods_columns(trainer: Trainer, outline: str, tmp_path: Path) -> None:
    conditions = "    conditions: {depth missing: {missing: [depth]}, one more: {flip: true}}\n"
    Path(outline).write_text(OUTLINE + conditions)
    text = study(outline, wish(tmp_path, seeds=2))
    assert rows(text) == [
        ["condition", "late ensemble, %", "concat, %", "TokenFusion, %", "runs"],
        ["as they are", "49.2 ± 0.4", "46.2 ± 0.3", "55.8 ± 1.1", "6"],
        ["depth missing", "24.6 ± 0.2", "23.1 ± 0.1", "27.9 ± 0.5", "6"],
        ["one more", "24.6 ± 0.2", "23.1 ± 0.1", "27.9 ± 0.5", "6"],
    ]
    trainer.trained.clear()
    trainer.judged.clear()
    Path(outline).write_text(OUTLINE + conditions.replace("[depth]", "[rgb]"))  # means something else now
    assert rows(study(outline, wish(tmp_path, seeds=2), train=False))[2][1:] == ["–", "–", "–", "0"]
    study(outline, wish(tmp_path, seeds=2))
    assert len(trainer.judged) == 6
    run = tmp_path / "out" / "rooms" / "concat-seed0"
    assert is_judged(run, "depth missing", {"missing": ["rgb"]})
    (run / "metrics.json").write_text(json.dumps({**json.loads((run / "metrics.json").read_text()), "data": "other"}))
    assert not is_judged(run, "depth missing", {"missing": ["rgb"]}), "its figures are of other data now"


def test_models_are_timed_when_nothing_else_runs(trainer: Trainer, outline: str, tmp_path: Path) -> None:
    Path(outline).write_text(OUTLINE.replace("FID: fid", "time: seconds"))
    text = study(outline, wish(tmp_path, seeds=1), jobs=2)
    assert trainer.order == ["cli"] * 3 + ["judging"] * 3
    assert "12.0" in rows(text)[1]
    trainer.order.clear()
    study(outline, wish(tmp_path, seeds=1))
    assert trainer.order == []


def test_every_subset_and_what_ones_own_recipe_has_no_input_for(outline: str, tmp_path: Path) -> None:
    conditions = """
    conditions: {"{subset} missing": {missing: ["{subset}"]}, noise: {degrade: {depth: {kind: noise, amount: 0.3}}}}
"""
    Path(outline).write_text(OUTLINE + conditions)
    three = wish(tmp_path, overrides=("data.modalities=[rgb, depth, normal]",))
    assert plan(read_study(outline)[1], three)[0].part.conditions == {
        "rgb missing": {"missing": ["rgb"]},
        "depth missing": {"missing": ["depth"]},
        "normal missing": {"missing": ["normal"]},
        "rgb + depth missing": {"missing": ["rgb", "depth"]},
        "rgb + normal missing": {"missing": ["rgb", "normal"]},
        "depth + normal missing": {"missing": ["depth", "normal"]},
        "noise": {"degrade": {"depth": {"kind": "noise", "amount": 0.3}}},
    }
    with pytest.raises(UserError, match=r"rooms.conditions.noise, of '.+': .+ names 'depth', which is no input here"):
        plan(read_study(outline)[1], wish(tmp_path, overrides=("data.modalities=[rgb, normal]",)))
    own = wish(tmp_path, recipe="toy-translation")
    assert list(plan(read_study(outline)[1], own)[0].part.conditions) == ["shade missing", "edge_texture missing"]


def test_ones_own_recipe(trainer: Trainer, tmp_path: Path) -> None:
    own = wish(
        tmp_path, seeds=1, recipe="toy-segmentation", overrides=("data.modalities=[rgb, depth, normal]",), data=None
    )
    part = plan(read_study("demo")[1], own)[0]
    assert list(part.cells) == ["rgb only", "depth only", "normal only", "late ensemble", "concat", "TokenFusion"]
    assert list(part.part.columns) == ["rgb", "depth", "normal", "ensemble"]
    assert part.cells["normal only"][0].overrides[-3:] == ("data.modalities=[normal]", "fuser=none", "seed=0")
    with pytest.raises(UserError, match="this study has the parts segmentation, detection; one recipe cannot"):
        plan(read_study("table5")[1], own)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"overrides": ("fuser=concat",)}, "fuser=concat: is what this study varies"),
        ({"overrides": ("seed=1",)}, "seed=1: is what this study varies"),
        ({"scale": "full"}, "--scale is full; this study has toy"),
        ({"recipe": "toy-segmentatio"}, "no recipe named 'toy-segmentatio'; did you mean 'toy-segmentation'"),
    ],
)
def test_wishes_that_cannot_be(trainer: Trainer, outline: str, tmp_path: Path, changes: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        study(outline, wish(tmp_path, **changes))
    assert trainer.trained == []


def test_rooms_are_drawn_where_nobody_has_them(
    trainer: Trainer, outline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn = []
    module = sys.modules[plan.__module__]
    monkeypatch.setattr(module, "prepare_rooms", lambda out: (drawn.append(out), described(out, "rooms")))
    study(outline, Wish(Path("out"), seeds=1))
    study(outline, Wish(Path("out"), seeds=2))
    assert drawn == [Path("out/rooms")]
    assert "data.root=out/rooms" in Path("out/rooms/concat-seed0/command.txt").read_text()


@pytest.mark.parametrize("freedom", [1, 2, 5, 30, 31, 50, 400])
def test_quantiles_are_those_of_student(freedom: int) -> None:
    assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=6e-5)


def test_differences_are_paired_by_seed() -> None:
    ours, theirs = {0: 3.0, 1: 5.0, 2: 8.0, 7: 100.0}, {0: 1.0, 1: 2.5, 2: 7.0, 3: -100.0}
    found = paired(ours, theirs)
    interval = stats.ttest_rel([3, 5, 8], [1, 2.5, 7]).confidence_interval(0.95)
    assert found is not None
    assert found.seeds == 3
    assert found.half is not None
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((interval.low, interval.high), abs=1e-4)
    assert paired({0: 3.0}, {0: 1.0}) == (2.0, None, 1)
    assert paired({0: 3.0}, {1: 1.0}) is None


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "rooms"
    api.prepare_rooms(folder, train=4, val=2, height=64, width=96)
    return folder


TINY = ("train.steps=2", "train.batch_size=2", "train.warmup_steps=1", "train.eval_every=0")


def test_a_real_run_is_trained_judged_and_resumed_without_its_weights(rooms: Path, tmp_path: Path) -> None:
    asked = Wish(tmp_path / "out", seeds=1, data=str(rooms), overrides=(*TINY, "data.crop=[64, 96]"), rows=("average",))
    text = study("rules", asked)
    assert {row[0]: row[-1] for row in rows(text)[1:] if row[-1] != "0"} == {"average": "1"}
    run = tmp_path / "out" / "segmentation" / "average-seed0"
    before = (run / "metrics.json").read_text()
    judge(run, {"depth missing": {"missing": ["depth"]}})
    assert is_judged(run, "depth missing", {"missing": ["depth"]})
    (run / "conditions" / "depth-missing.json").unlink()
    to = str(run / "conditions" / "depth-missing.json")  # what a table's command says does the same
    words = [sys.executable, "-m", "tokenfusion.cli", "eval", str(run), 'evaluation.missing=["depth"]', "--to", to]
    subprocess.run(words, check=True, capture_output=True)
    found = json.loads((run / "conditions" / "depth-missing.json").read_text())
    assert found["evaluation"] == {"missing": ["depth"]}
    assert found["streams"] != json.loads(before)["streams"]
    assert (run / "metrics.json").read_text() == before
    assert is_judged(run, "depth missing", {"missing": ["depth"]})
    (run / "metrics.json").write_text(before.replace('"step": 2', '"step": 3'))
    assert not is_judged(run, "depth missing", {"missing": ["depth"]}), "it has gone on since then"
    (run / "metrics.json").write_text(before)
    for path in (run / "checkpoints").rglob("*"):
        if path.is_file():
            path.unlink()
    assert study("rules", asked) == text
    assert (run / "metrics.json").read_text() == before
    cell = plan(read_study("rules")[1], asked)[0].cells["average"][0]
    assert is_done(cell)
    assert not is_done(cell._replace(overrides=(*cell.overrides, "train.steps=3")))
    with pytest.raises(
        UserError, match="holds a run of another recipe"
    ):  # its figures must not become those of this one
        api.train(read_recipe(cell.recipe, [*cell.overrides, "train.lr=0.5"]), cell.run)
    assert is_done(cell)


def test_a_detector_is_timed(rooms: Path, tmp_path: Path) -> None:
    recipe = read_recipe("toy-detection3d", [*TINY, f"data.root={rooms}", "data.modalities=[points]", "fuser=none"])
    api.train(recipe, tmp_path)
    measure(tmp_path)
    found = json.loads((tmp_path / "seconds.json").read_text())
    assert found["timed"] == 1, "the first one is not counted"
    assert is_timed(tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    (tmp_path / "metrics.json").write_text(json.dumps({**metrics, "step": 3}))
    assert not is_timed(tmp_path), "it has gone on since then"
    assert "seconds" not in figures(tmp_path)
    assert 0 < found["seconds"] < 1000


def test_the_verb(rooms: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tokenfusion.cli", "study", "rules", "--table", "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--data", str(rooms)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| late ensemble | – |" in done.stdout
    assert "page: " in done.stdout
    done = subprocess.run([*command, "--scale", "tiny"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "tokenfusion: --scale is 'tiny'; wanted toy, small, full\n")
