"""The command line: every verb is also a Python function."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tokenfusion.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
out_console = Console(highlight=False)

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides: key.path=value, e.g. train.lr=1e-4 fuser=concat")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Trust = Annotated[bool, typer.Option("--trust", help="Build components outside of tokenfusion that a recipe names.")]
Checkpoint = Annotated[str, typer.Option(help="last or best.")]


@app.callback()
def _common(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    """Fused multimodal transformers out of single-modal ones (TokenFusion)."""


@app.command("ls")
def list_(as_json: Json = False) -> None:
    """Recipes, studies, fusers, backbones, data sets."""
    from tokenfusion import tables
    from tokenfusion.api import DATASETS
    from tokenfusion.backbones import mirror, yolos
    from tokenfusion.backbones.mit import DEPTHS
    from tokenfusion.recipe import FUSERS, fusers, shipped
    from tokenfusion.study import shipped as studies

    content = {
        "recipes": shipped(),
        "studies": studies(),
        "fusers": {name: spec["_target_"] for name, spec in FUSERS.items()},
        "fusers of detection3d": {name: spec["_target_"] for name, spec in fusers("detection3d").items()},
        "backbones": {f"mit-{v}": f"Mix Transformer, depths {' '.join(map(str, d))}" for v, d in DEPTHS.items()}
        | {f"mirror-{v}": f"generator of MiT blocks, encoder {' '.join(map(str, d))}" for v, d in mirror.DEPTHS.items()}
        | {"group-free": "detector of points: PointNet++, a transformer decoder; layers, proposals and width as wanted"}
        | {
            f"yolos-{v}": f"detector of images: a ViT, {p.size.depth} blocks of width {p.size.dim}"
            for v, p in yolos.VARIANTS.items()
        }
        | {"timm/NAME, hf/ID": "segmentation: any transformer of timm or Hugging Face (docs/families.md)"},
        "datasets": DATASETS,
    }
    if as_json:
        return _json(content)
    for title, entries in content.items():
        out_console.print(tables.listed(title, entries), "")


@app.command()
def show(recipe: str, overrides: Overrides = None) -> None:
    """The resolved recipe, as YAML."""
    import yaml

    from tokenfusion.recipe import read_recipe

    resolved = read_recipe(recipe, overrides or []).model_dump(mode="json")
    typer.echo(yaml.safe_dump(resolved, sort_keys=False), nl=False)


@app.command()
def prepare(
    dataset: Annotated[str, typer.Argument(help="nyudv2, sunrgbd, scannet, taskonomy or rooms.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    source: Annotated[Path | None, typer.Option(help="Folder with the official files.")] = None,
    depth: Annotated[str | None, typer.Option(help="nyudv2, sunrgbd: filled (default) or raw.")] = None,
    task: Annotated[
        str | None, typer.Option(help="sunrgbd: segmentation (default) or detection3d, which has scenes with boxes.")
    ] = None,
    boxes: Annotated[str | None, typer.Option(help="sunrgbd --task detection3d: v1 (default) or v2.")] = None,
    views: Annotated[int | None, typer.Option(help="scannet: images of a scene, 10.")] = None,
    domains: Annotated[
        str | None, typer.Option(help="taskonomy: e.g. rgb,normal,depth_zbuffer; default: what most views have.")
    ] = None,
    on_bad: Annotated[
        str | None,
        typer.Option(help="taskonomy, scannet, boxes of sunrgbd: stop (default) at what cannot be used, or skip it."),
    ] = None,
    train_count: Annotated[int | None, typer.Option("--train", help="rooms: training frames, 400.")] = None,
    val_count: Annotated[int | None, typer.Option("--val", help="rooms: validation frames, 100.")] = None,
    height: Annotated[int | None, typer.Option(help="rooms: rows, 96.")] = None,
    width: Annotated[int | None, typer.Option(help="rooms: columns, 128.")] = None,
    seed: Annotated[int | None, typer.Option(help="rooms, and points that are drawn: 0.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check an existing --out against its manifest instead.")
    ] = False,
) -> None:
    """Write an official archive (or the procedural rooms) in the one on-disk format."""
    from tokenfusion import api
    from tokenfusion.data.folder import Folder

    if verify:
        typer.echo(f"{out}: {Folder(out).verify(show_progress=True)} files as prepared")
        return
    names = None if domains is None else [name.strip() for name in domains.split(",")]
    options = {"depth": depth, "domains": names, "on_bad": on_bad, "train": train_count, "val": val_count}
    options |= {"height": height, "width": width, "seed": seed, "task": task, "boxes": boxes, "views": views}
    given = {name: value for name, value in options.items() if value is not None}
    for name, count in api.prepare(dataset, source, out, given).items():
        typer.echo(f"{name}: {count}")
    typer.echo(f"written: {out}")


@app.command()
def train(
    recipe: str,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Run folder; where it holds checkpoints, training goes on.")] = Path("run"),
    trust: Trust = False,
) -> None:
    """Train a recipe; goes on by itself where the run folder holds a checkpoint."""
    from tokenfusion import api, tables
    from tokenfusion.recipe import read_recipe

    result = api.train(read_recipe(recipe, overrides or []), out, trust)
    if result.is_first:
        out_console.print(tables.figures(json.loads((out / "metrics.json").read_text())))


@app.command("eval")
def evaluate(
    run: Path,
    changes: Annotated[
        list[str] | None,
        typer.Argument(help="Another way to judge, this time: evaluation.features=pixels evaluation.missing='[depth]'"),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Another data set than the recipe's.")] = None,
    split: Annotated[str | None, typer.Option(help="Split, e.g. val.")] = None,
    multi_scale: Annotated[
        bool, typer.Option("--multi-scale", help="Segmentation: six scales and their mirror images.")
    ] = False,
    checkpoint: Checkpoint = "last",
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Print IoU, or AP and recall, of every class too.")
    ] = False,
    to: Annotated[Path | None, typer.Option(help="File to write in place of the run's metrics.json.")] = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Judge a run; prints a table and writes metrics.json."""
    from tokenfusion import api, tables
    from tokenfusion.recipe import evaluation_changes
    from tokenfusion.tasks.segmentation.inference import MULTI_SCALE

    if per_class or multi_scale:
        _check_options(run, api.recipe_of(run).task, per_class, multi_scale)
    evaluation = {**(MULTI_SCALE if multi_scale else {}), **evaluation_changes(changes or [])}
    metrics = api.evaluate(run, data, split, evaluation, checkpoint, trust, to)
    if as_json:
        return _json(metrics)
    out_console.print(tables.figures(metrics))
    if per_class:
        out_console.print(tables.classes(metrics))


@app.command()
def predict(
    run: Path,
    files: Annotated[
        list[str] | None,
        typer.Argument(help="Input files: rgb=a.jpg depth=a.png, or points=a.npy rgb=a.jpg camera=a.json"),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="A data set folder instead of single files.")] = None,
    split: Annotated[str | None, typer.Option(help="One split of --data; all without it.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("predictions"),
    checkpoint: Checkpoint = "last",
    trust: Trust = False,
) -> None:
    """Predict on one's own files: labels, the generated image, or boxes with pictures of them; and every token's score."""
    from tokenfusion import api

    named = _pairs(files, api.example_of(run)) if files else None
    written = api.predict(run, out, named, data, split, checkpoint, trust)
    shown = written if len(written) <= 6 else [*written[:3], f"... and {len(written) - 3} more files"]
    for path in shown:
        typer.echo(str(path))


@app.command()
def report(run: Path) -> None:
    """One self-contained HTML page of a run: curves, tables, samples, exchanged tokens."""
    from tokenfusion.report import write_report

    typer.echo(str(write_report(run)))


@app.command()
def compare(
    runs: list[Path], out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("compare.html")
) -> None:
    """One page that sets runs side by side."""
    from tokenfusion.report import write_comparison

    typer.echo(str(write_comparison(runs, out)))


@app.command()
def convert(
    file: Path,
    source: Annotated[
        str,
        typer.Option(
            "--from",
            help="released-segmentation, released-translation, groupfree, segformer, hf-segformer, hf-dinov2, yolos, "
            "hf-yolos, deit.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    dataset: Annotated[
        str | None, typer.Option(help="dataset.yaml or folder that says how own files are read.")
    ] = None,
    modalities: Annotated[str, typer.Option(help="Names of the streams, in the file's order.")] = "rgb,depth",
    target: Annotated[str, typer.Option(help="released-translation: the modality that is generated.")] = "rgb",
) -> None:
    """A foreign checkpoint in our format: a run folder that eval, predict and load() take."""
    from tokenfusion.convert import convert as run

    typer.echo(run(file, source, out, dataset, tuple(modalities.split(",")), target))


@app.command("export")
def export_(
    run: Path,
    format: Annotated[str, typer.Option(help="onnx, or pt2: what torch.export.load reads.")],
    out: Annotated[Path, typer.Option(help="File to write: NAME.onnx or NAME.pt2.")],
    height: Annotated[int | None, typer.Option(help="Rows of the images; as in evaluation.")] = None,
    width: Annotated[int | None, typer.Option(help="Columns of the images; as in evaluation.")] = None,
    batch: Annotated[int | None, typer.Option(help="A fixed batch size; any without it, 1 in 3D detection.")] = None,
    checkpoint: Checkpoint = "last",
    trust: Trust = False,
) -> None:
    """The model as one file for other programs, checked against the model before it appears."""
    from tokenfusion.export import export

    written = export(run, format, out, height, width, batch, checkpoint, trust)
    for key in ("inputs", "outputs"):
        shapes = {name: " x ".join(map(str, fact["shape"])) for name, fact in written.facts[key].items()}
        shown = [f"{name} [{shape}]" for name, shape in shapes.items() if not name.startswith("scores/")]
        more = [f"scores of {len(shapes) - len(shown)} blocks"] if len(shapes) > len(shown) else []
        typer.echo(f"{key}: {', '.join([*shown, *more])}")
    for name, fact in written.facts["inputs"].items():
        if "formula" in fact:
            means = f", mean {fact['mean']}, std {fact['std']}" if "mean" in fact else ""
            typer.echo(f"{name}: {fact['formula']}, in {fact['unit']}{means}")
    typer.echo(f"largest difference to the model: {written.difference:.1e}")
    typer.echo(f"written: {out} ({out.stat().st_size / 2**20:.1f} MB)")


@app.command()
def bench(
    recipe: str,
    overrides: Overrides = None,
    size: Annotated[
        str | None, typer.Option(help="ROWSxCOLUMNS of the images; by task 480x640, 256x256 or the recipe's own.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 7,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Time, memory, parameters and FLOPs, beside the unfused streams and what else the task is measured against."""
    import torch

    from tokenfusion import tables
    from tokenfusion.bench import bench as run

    rows, _, columns = (size or "").partition("x")
    if size and not (rows.isdigit() and columns.isdigit()):
        raise UserError(f"--size is {size!r}; wanted ROWSxCOLUMNS, e.g. 480x640")
    if threads:
        torch.set_num_threads(threads)
    result = run(recipe, overrides or [], (int(rows), int(columns)) if size else None, rounds)
    if as_json:
        return _json(result)
    out_console.print(tables.race(result))
    for name, ratio in result["ratios"].items():
        typer.echo(f"{name}: {ratio:.3f}")


@app.command()
def study(
    name: Annotated[
        str, typer.Argument(help="A study (tokenfusion ls), tableN for the one with Table N, or a YAML file.")
    ],
    overrides: Overrides = None,
    scale: Annotated[
        str, typer.Option(help="toy: rooms, two cores; small: a cut-down real set; full: the paper's.")
    ] = "toy",
    seeds: Annotated[int, typer.Option(help="Runs per row, with seeds 0, 1, ...", min=1)] = 3,
    out: Annotated[Path | None, typer.Option(help="Folder for runs and tables; runs/NAME-SCALE.")] = None,
    data: Annotated[str | None, typer.Option(help="One data set for all runs, in place of the recipes' own.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Your recipe in place of the study's, where it has one part.")
    ] = None,
    rows: Annotated[str | None, typer.Option(help="Train these rows only: titles with commas between them.")] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Runs at a time; one per CUDA device, or two that share the cores.", min=1)
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Write the tables of what is done; train nothing.")] = False,
) -> None:
    """Compare recipes at the same budget; runs that are done are not repeated, and end in a table and a page."""
    from tokenfusion.study import SCALES, Wish, read_study
    from tokenfusion.study import study as carry_out

    if scale not in SCALES:
        raise UserError(f"--scale is {scale!r}; wanted {', '.join(SCALES)}")
    titles = tuple(title.strip() for title in rows.split(",")) if rows else ()
    out = out or Path("runs") / f"{read_study(name)[0]}-{scale}"
    wish = Wish(out, scale, seeds, data, recipe, tuple(overrides or ()), titles)
    typer.echo(carry_out(name, wish, jobs, train=not table))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, devices and which optional parts are there."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    content: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    libraries = "tokenfusion torch torchvision lightning-fabric transformers timm onnx onnxruntime"
    for library in (*libraries.split(), "h5py", "numba", "scipy", "matplotlib", "jinja2"):
        try:
            content[library] = version(library)
        except PackageNotFoundError:
            content[library] = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    content |= {"cpu threads": torch.get_num_threads(), "gpus": ", ".join(gpus) or "none"}
    if as_json:
        return _json(content)
    for key, value in content.items():
        typer.echo(f"{key:18} {value}")


def _pairs(arguments: list[str], example: str) -> dict[str, Path]:
    pairs: dict[str, Path] = {}
    for argument in arguments:
        name, sign, path = argument.partition("=")
        if not sign or not name or not path:
            raise UserError(f"{argument!r}: wanted name=file, for example {example}")
        if name in pairs:
            raise UserError(f"{argument!r}: {name} is given twice")
        pairs[name] = Path(path)
    return pairs


def _json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=1))


def _check_options(run: Path, task: str, per_class: bool, multi_scale: bool) -> None:
    if per_class and task == "translation":
        raise UserError(f"--per-class: {run} is a translation, which has no classes; leave it out")
    if multi_scale and task != "segmentation":
        raise UserError(f"--multi-scale: {run} is a run of {task}; only segmentation is judged at several scales")


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2; a traceback only with ``--debug``, wherever it stands."""
    debug = "--debug" in sys.argv
    try:
        app(args=[word for word in sys.argv[1:] if word != "--debug"])
    except (UserError, OSError) as error:
        if debug:
            raise
        message = (
            error
            if isinstance(error, UserError)
            else f"{error.filename or 'input or output'}: {error.strerror or error}"
        )
        typer.echo(f"tokenfusion: {message}", err=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
