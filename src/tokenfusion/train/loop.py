"""The only training loop: it serves every task, goes on after a kill, and ends at the same bits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tokenfusion.errors import UserError, nearest
from tokenfusion.manifest import lock_folder, unlock_folder
from tokenfusion.train.batches import Batches, derive_seed
from tokenfusion.train.checkpoint import Checkpoint, Checkpoints, read
from tokenfusion.train.engine import Engine
from tokenfusion.train.log import Display, MetricsLog, Window, jsonable, warn
from tokenfusion.train.optim import Optimizers
from tokenfusion.train.settings import WITHOUT_EFFECT_ON_WEIGHTS, TrainSettings
from tokenfusion.train.task import Task

Evaluate = Callable[[Engine], Mapping[str, float]]
PATIENCE_S = 10.0  # the loaders of a killed training end within five seconds


class FitResult(NamedTuple):
    """How a run ended: steps done, the best ``monitor`` (None without validation), the last validation figures.

    ``is_first`` is true in one of several processes: the one that goes on with what is done once.
    """

    steps: int
    best: float | None
    metrics: dict[str, float]
    is_first: bool = True


def fit(
    task: Task,
    train_data: Any,
    run_dir: str | Path,
    settings: TrainSettings,
    *,
    seed: int = 0,
    evaluate: Evaluate | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    progress: Literal["auto", "plain", "silent"] = "auto",
) -> FitResult:
    """Train a task; where ``run_dir`` holds checkpoints, go on from the newest whole one.

    Args:
        task: see :class:`Task`; it is trained in place.
        train_data: a data set with a length. An item is a function of (seed, epoch, index): where the data set has
            ``set_epoch(epoch)``, it is called before the items of an epoch are asked for.
        run_dir: gets ``metrics.jsonl`` and ``checkpoints/``.
        seed: order of the data and everything that the task draws at random.
        evaluate: validation figures by flat name, the same in every process; ``task.evaluate`` otherwise.
        collate: list of samples -> batch.
        progress: ``"auto"`` (a bar on a terminal, else lines), ``"plain"`` or ``"silent"``; on standard error.

    Raises:
        UserError: a loss or weight that is not finite, a disk that is full, checkpoints that are all damaged or of
            another model, a batch that the devices cannot share, another process that trains in this folder.
    """
    engine = Engine(settings.devices, settings.precision, settings.accelerator)
    with engine.guarded(), _alone(Path(run_dir), engine):
        batches = Batches(
            train_data,
            settings.batch_size,
            seed,
            rank=engine.rank,
            world=engine.world,
            pieces=settings.accumulate,
            workers=settings.workers,
            collate=collate,
            pin_memory=engine.device.type == "cuda",
        )
        run = _Run(task, engine, Path(run_dir), settings, seed, evaluate or task.evaluate)
        run.resume()
        with Display(settings.steps, run.step, progress if engine.is_first else "silent") as display:
            run.train(batches, display)
        return FitResult(run.step, run.best, run.metrics, engine.is_first)


@contextmanager
def _alone(run_dir: Path, engine: Engine) -> Iterator[None]:
    """Let no other training write to a run folder meanwhile."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(run_dir, "training in this folder", PATIENCE_S) if engine.is_first else -1
    try:
        yield
    finally:
        unlock_folder(lock)


def train_step(
    task: Task, engine: Engine, optimizers: Optimizers, pieces: Sequence[Any], clip_norm: float | None, watch: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step: forward once, then each phase's losses, backward and optimiser. Returns losses and watched scalars."""
    logged: dict[str, Tensor] = {}
    watched: dict[str, Tensor] = {}
    for number, piece in enumerate(pieces, 1):
        batch = engine.to_device(piece)
        with engine.autocast():
            outputs = task(batch)
        for phase, optimizer in optimizers.optimizers.items():
            with optimizers.only(phase):
                with engine.autocast():
                    losses = task.losses(batch, outputs, phase)
                total = sum(losses.values(), torch.zeros((), device=engine.device)) / len(pieces)
                engine.backward(total)
                if number == len(pieces):
                    engine.step(optimizer, optimizers.params[phase], clip_norm)
            for name, value in _named(task, phase, losses, len(pieces)).items():
                logged[name] = logged[name] + value if name in logged else value
        if watch and number == len(pieces):
            with torch.no_grad():
                watched = task.watch(outputs)
    return logged, watched


def _named(task: Task, phase: str, losses: Mapping[str, Tensor], pieces: int) -> dict[str, Tensor]:
    """``loss/<term>`` and ``loss/total``; with several phases ``loss/<phase>/<term>``."""
    prefix = "loss" if len(task.phases) == 1 else f"loss/{phase}"
    shares = {f"{prefix}/{name}": value.detach().double() / pieces for name, value in losses.items()}
    return {**shares, f"{prefix}/total": torch.stack(list(shares.values())).sum()}


class _Run:
    """A run in progress: what a checkpoint holds, and when to log, validate and save."""

    def __init__(
        self, task: Task, engine: Engine, run_dir: Path, settings: TrainSettings, seed: int, evaluate: Evaluate
    ) -> None:
        if settings.accumulate > 1 and len(task.phases) > 1:
            raise UserError(f"train.accumulate is {settings.accumulate}; a task of several phases wants 1")
        self.task, self.engine, self.settings, self.seed, self.evaluate = task, engine, settings, seed, evaluate
        self.checkpoints = Checkpoints(run_dir, settings.keep)
        self.log = MetricsLog(run_dir / "metrics.jsonl")
        engine.adopt(task)
        self.optimizers = Optimizers(task, settings)
        self.window = Window(engine)
        self.step = 0
        self.best: float | None = None
        self.metrics: dict[str, float] = {}
        self.seconds_before = 0.0
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start of the run, without the time between a kill and the restart."""
        return self.seconds_before + time.monotonic() - self.began

    def train(self, batches: Batches, display: Display) -> None:
        """From ``self.step`` to the end."""
        settings, task = self.settings, self.task
        task.train()
        if self.step < settings.steps:
            source = batches.from_step(self.step)
        while self.step < settings.steps:
            pieces = next(source)
            lr = self.optimizers.begin(self.step)
            task.begin(self.step)
            torch.manual_seed(derive_seed(self.seed, "step", self.step, self.engine.rank))
            self.step += 1
            logs = self._due(settings.log_every)
            losses, watched = train_step(task, self.engine, self.optimizers, pieces, settings.clip_norm, logs)
            self.window.add(self.step, losses)
            display.advance(self.step)
            if logs:
                self._log(lr, watched, display)
            if self._due(settings.eval_every):
                self._validate(display)
            if self._due(settings.checkpoint_every):
                self._save()

    def resume(self) -> None:
        """Take up the newest whole checkpoint, if there is one."""
        found = self.checkpoints.newest() if self.engine.is_first else None
        folder = self.engine.from_first(found.folder if found else None)
        if folder is not None:
            self._load(found or read(folder))
        if self.engine.is_first:
            self.log.keep_until(self.step)

    def _due(self, every: int) -> bool:
        return self.step == self.settings.steps or (every > 0 and self.step % every == 0)

    def _log(self, lr: float, watched: Mapping[str, Tensor], display: Display) -> None:
        values = self.window.means()
        if watched:
            names = sorted(watched)
            means = self.engine.mean(torch.stack([watched[name].double() for name in names]))
            values |= dict(zip(names, means.tolist(), strict=True))
        self.window.clear()
        values["lr"] = lr
        if self.engine.is_first:
            self.log.write(self.step, "train", self.seconds, values)
        display.losses(self.step, values)

    def _validate(self, display: Display) -> None:
        self.window.means()  # a loss that is not finite ends the run before it is judged
        self.engine.share_buffers(self.task)
        self.task.eval()
        with torch.no_grad():
            figures = self.evaluate(self.engine)
        self.task.train()
        self.metrics = self.engine.from_first({name: float(value) for name, value in figures.items()})
        if not self.metrics:
            return
        if self.engine.is_first:
            self.log.write(self.step, "val", self.seconds, self.metrics)
        display.figures(self.step, self.metrics, [self.task.monitor])
        if self._is_best():
            self.best = self.metrics[self.task.monitor]
            if self.engine.is_first:
                self.checkpoints.save_best(self._weights(), self._state())

    def _is_best(self) -> bool:
        name = self.task.monitor
        if not name:
            return False
        if name not in self.metrics:
            raise UserError(f"no validation figure is named {name!r} (the monitor); {nearest(name, self.metrics)}")
        value, sign = self.metrics[name], 1 if self.task.higher_is_better else -1
        return value == value and (self.best is None or sign * value > sign * self.best)  # NaN is never best

    def _save(self) -> None:
        self.window.means()
        weights = self._weights()
        if self.engine.is_first:
            self.checkpoints.save(self.step, weights, self.optimizers.tensors(), self._state())
        self.engine.barrier()

    def _weights(self) -> dict[str, Tensor]:
        """The task's tensors.

        Raises:
            UserError: where a weight is not finite: such a checkpoint would be the newest, and useless.
        """
        finite = torch.stack([torch.isfinite(p.detach()).all() for p in self.task.parameters()])
        if not bool(finite.all()):
            raise UserError(
                f"step {self.step}: the weights are not finite: lower train.lr or set train.clip_norm; earlier"
                " checkpoints are intact"
            )
        return self.task.state_dict()

    def _state(self) -> dict[str, Any]:
        return {
            "format": 1,
            "step": self.step,
            "seed": self.seed,
            "seconds": self.seconds,
            "monitor": self.task.monitor,
            "best": self.best,
            "metrics": jsonable(self.metrics),
            "window": self.window.state(),
            "scaler": self.engine.scaler.state_dict(),
            "devices": self.engine.world,
            "settings": self.settings.model_dump(mode="json"),
        }

    def _load(self, checkpoint: Checkpoint) -> None:
        state, source = checkpoint.state, str(checkpoint.folder)
        if state["step"] > self.settings.steps:
            raise UserError(f"{source}: the run is beyond train.steps = {self.settings.steps}: raise it, or start anew")
        try:
            self.task.load_state_dict(checkpoint.model)
        except RuntimeError as error:
            raise UserError(f"{source}: not of this model ({' '.join(str(error).split())[:200]}): start anew") from None
        self.optimizers.load_tensors(checkpoint.optimizer, source)
        # a converted checkpoint says its step (0) and no more
        self.step, self.best = state["step"], state.get("best")
        self.metrics = {name: float("nan") if v is None else v for name, v in state.get("metrics", {}).items()}
        self.seconds_before = state.get("seconds", 0.0)
        self.window = Window(self.engine, state.get("window"))
        if state.get("scaler"):
            self.engine.scaler.load_state_dict(state["scaler"])
        if self.engine.is_first and "settings" in state:
            self._warn_of_changes(state)

    def _warn_of_changes(self, state: Mapping[str, Any]) -> None:
        now = self._state()
        old, new = state["settings"], now["settings"]
        keys = [f"train.{k}" for k in new if k not in WITHOUT_EFFECT_ON_WEIGHTS and new[k] != old.get(k)]
        keys += [name for name in ("seed", "devices") if now[name] != state[name]]
        if keys:
            warn(f"going on from step {self.step} with other settings than before: {', '.join(keys)}")
