"""`diffmf train`: training on aligned crops, on one process or several (torchrun).

Everything random is a function of the seed and the step (batch order, crops, stochastic depth), so a run that was
stopped or killed at any moment continues from its last saved state with the same losses, bit for bit on the CPU. On
GPUs a step's forward pass, loss and backward pass are replayed as one CUDA graph (without train.compile). The first
Ctrl-C or SIGTERM ends a run after its step and a save.

A run folder holds last.safetensors and best.safetensors (model files; the averaged weights where train.ema is set),
state.safetensors (what --resume continues from), log.jsonl (one line per step), validation.jsonl, run.json (settings,
machine and speed, for `diffmf experiments`) and tensorboard/.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from .checkpoint import (
    add_device_argument,
    load_model,
    read_training_state,
    restore_training_state,
    save_model,
    save_training_state,
    select_device,
)
from .config import Config, ModelConfig, TrainConfig, add_config_argument, load_config, to_dict, updated
from .cuda_graph import captured
from .data import PairDataset, RandomCrops
from .errors import UserError
from .images import atomic_write, make_folder, to_uint8
from .loss import FusionLoss
from .metrics import METRICS, check_size, evaluate_pair
from .network import DIFFMF
from .timing import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, metavar="ROOT", help="data set with ir/, vi/ and optionally splits/")
    add_config_argument(parser)
    parser.add_argument("--output", default="runs/diffmf", metavar="DIR", help="run folder (default: %(default)s)")
    add_device_argument(parser)
    parser.add_argument("--resume", action="store_true", help="continue the run in the run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as train.epochs=10")


def run(args: argparse.Namespace) -> int:
    with _processes(args.device) as (rank, world, device):
        folder = make_folder(args.output)
        state = folder / "state.safetensors"
        tensors, info = None, None
        if args.resume and state.exists():
            tensors, info = read_training_state(state)
            saved = updated(Config(), info["config"], where=f"{state}: ")
            config = load_config(args.config, args.overrides, base=saved)
            _check_continues(state, info, saved, config, world)
        else:
            if state.exists():
                raise UserError(f"{folder}: already holds a run; pass --resume, or another --output")
            if args.resume:
                raise UserError(f"{folder}: holds no run to resume")
            config = load_config(args.config, args.overrides)
        trainer = Trainer(config, args.data, folder, device, rank, world)
        if tensors is not None:
            trainer.restore(state, tensors, info, saved)
        elif config.train.weights:
            trainer.start_from(config.train.weights)
        with trainer:
            if tensors is None:
                if world > 1:
                    dist.barrier()  # all have seen that the folder holds no run
                trainer.save()  # what --resume needs, if the run is killed before its first checkpoint
            trainer.train()
    return 0


WARM_STEPS, TIMED_STEPS = 10, 30  # train.fit_minutes times the second after the first
RESERVE = 0.06  # part of train.fit_minutes for validation, saving and a machine that slows down


class EpochBatches(Sampler[list[int]]):
    """This process's batches of an epoch, from a given step on; the remainder below a full global batch is left out."""

    def __init__(self, length: int, batch_size: int, rank: int, world: int, seed: int):
        self.length, self.batch_size, self.rank, self.world, self.seed = length, batch_size, rank, world, seed
        self.epoch = self.start = 0

    def set_position(self, epoch: int, start: int) -> None:
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.world)

    def __iter__(self):
        # The third number keeps this stream apart from the crops', which are seeded by (seed, epoch, index < length).
        order = np.random.default_rng((self.seed, self.epoch, self.length)).permutation(self.length)
        for step in range(self.start, len(self)):
            first = (step * self.world + self.rank) * self.batch_size
            yield order[first : first + self.batch_size].tolist()


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The rate of a step (from 0): linear warm-up, then constant or half a cosine down to zero."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


class Trainer:
    """One run: data, network, optimizer, and the files of the run folder. A context manager that closes the logs.

    Raises UserError when the training split is smaller than one global batch, and, while training, when the loss or the
    gradient is no longer finite.
    """

    def __init__(self, config: Config, data: str | Path, folder: Path, device: torch.device, rank: int, world: int):
        self.config, self.folder, self.device, self.rank, self.world = config, folder, device, rank, world
        settings = config.train
        self.score_names = _score_names(settings.best_by)
        self.crops = RandomCrops(
            PairDataset(data, split="train"), config.data.crop_size, settings.seed, config.data.jitter
        )
        self.validation_pairs = PairDataset(data, split="val")
        names = json.dumps([self.crops.pairs.names, self.validation_pairs.names])
        self.names = hashlib.sha256(names.encode()).hexdigest()
        self.global_batch = config.data.batch_size * world
        self.batches = EpochBatches(len(self.crops), config.data.batch_size, rank, world, settings.seed)
        if len(self.batches) == 0:
            raise UserError(
                f"{data}: {len(self.crops)} training pairs, expected at least one batch of {config.data.batch_size} "
                f"for each of {world} processes (data.batch_size)"
            )
        for index in range(rank, len(self.validation_pairs), world):
            pair = self.validation_pairs[index]  # read now: a bad one would end the run at its first validation
            try:
                check_size(*pair["ir"].shape[1:])
            except ValueError as error:
                raise UserError(f"validation pair {pair['name']}: {error}") from error
        workers = config.data.workers
        self.loader = DataLoader(
            self.crops,
            batch_sampler=self.batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )
        self.total_steps = len(self.batches) * settings.epochs
        torch.manual_seed(settings.seed)
        self.model = DIFFMF(config.model).to(device)
        self.network = torch.compile(self.model) if settings.compile else self.model
        self.loss = FusionLoss(config.loss)
        self.gradients = None  # `_gradients` or its graph, from the first step on
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.lr, fused=device.type == "cuda")
        self.averaged = None
        if settings.ema > 0:
            self.averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
        self.step, self.validations, self.best = 0, 0, None
        self.stopped: list[int] = []  # by signals
        self.fitted_steps, self.timed_from = 0, 0.0
        self.started, self.rate = time.monotonic(), 0.0
        self.record = {"data": str(data), "environment": environment(device.type), "processes": world}
        self.files = contextlib.ExitStack()

    def __enter__(self) -> Trainer:
        self.log, self.validation_log, self.board = None, None, None
        if self.rank == 0:
            # One line per step and per validation: what a killed run wrote past its last saved state goes.
            self.log = self.files.enter_context(_reopen(self.folder / "log.jsonl", self.step))
            self.validation_log = self.files.enter_context(_reopen(self.folder / "validation.jsonl", self.validations))
            self.board = (
                _summary_writer(self.folder / "tensorboard", self.step) if self.config.logging.tensorboard else None
            )
            if self.board is not None:
                self.files.enter_context(self.board)
        return self

    def __exit__(self, *error) -> None:
        self.files.close()

    def start_from(self, weights: str) -> None:
        """Takes over a model's parameters. Raises UserError as `load_model` does and where its settings are others."""
        model = load_model(weights)
        if model.config != self.config.model:
            raise UserError(f"train.weights: {weights} has {_others(model.config, self.config.model)}")
        self.model.load_state_dict(model.state_dict())

    def restore(self, path: Path, tensors: dict[str, torch.Tensor], info: dict, saved: Config) -> None:
        """Continues from a state and the settings saved with it. Raises UserError for a state of other data."""
        if info.get("training_pairs", len(self.crops)) != len(self.crops):
            raise UserError(f"--data: {len(self.crops)} training pairs, but the run has {info['training_pairs']}")
        if info.get("names", self.names) != self.names:  # states of earlier versions have none
            raise UserError(f"--data: {self.record['data']} has other training or validation pairs than the run")
        restore_training_state(path, tensors, self.model, self.optimizer, self.averaged)
        self.step, self.validations, self.best = info["step"], info["validations"], info["best"]
        self.fitted_steps = info.get("fitted_steps", 0) if self.config.train.fit_minutes else 0
        self.total_steps = self.fitted_steps or self.total_steps
        best_by = self.config.train.best_by
        if best_by != saved.train.best_by or (best_by == "loss" and self.config.loss != saved.loss):
            self.best = None  # a score of something else
            if self.rank == 0:
                print("train.best_by or the loss is another: best.safetensors is chosen anew", file=sys.stderr)

    def train(self) -> None:
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        with (
            _stopped_by_signals() as self.stopped,
            tqdm(
                total=self.total_steps,
                initial=self.step,
                unit="step",
                disable=self.rank != 0,
                mininterval=0.5 if sys.stderr.isatty() else 30,
            ) as progress,
        ):
            stop, first = False, self.step
            batches = self._batches()
            batch = next(batches, None)
            while batch is not None and not stop:
                values = self._start_step(batch)
                following = next(batches, None)  # is loaded while the device is at work
                record, stop = self._finish_step(values, batch["name"])
                batch = following
                if self.config.train.fit_minutes and not self.fitted_steps:
                    self._fit_steps(self.step - first)
                    progress.total = self.total_steps
                self.rate = (self.step - first) * self.global_batch / (time.monotonic() - self.started)
                progress.set_description(f"epoch {record['epoch']}/{self.config.train.epochs}", refresh=False)
                progress.set_postfix_str(f"loss {record['loss']:.4f}, {self.rate:.1f} images/s", refresh=False)
                stop = stop or self.step >= self.total_steps
                self._after_step(record, stop)
                progress.update()
        if self.rank == 0:
            left = f"; --resume continues towards {self.total_steps}" if self.step < self.total_steps else ""
            best = "" if self.best is None else f", best {self.config.train.best_by} {abs(self.best):.4f}"
            print(f"{self.folder}: step {self.step} of {self.total_steps}{best}{left}")
        if self.stopped:
            raise KeyboardInterrupt

    def _batches(self) -> Iterator[dict]:
        """The batches of the steps that are left, epoch after epoch."""
        step = self.step
        while step < self.total_steps:
            epoch, start = divmod(step, len(self.batches))
            self.batches.set_position(epoch, start)
            self.crops.set_epoch(epoch)
            try:
                for batch in self.loader:
                    yield batch
                    step += 1
                    if step >= self.total_steps:
                        return
            except UserError as error:  # a worker's has a traceback around it
                raise UserError(str(error).rpartition(f"{UserError.__name__}: ")[2].strip()) from error

    def _start_step(self, batch: dict) -> torch.Tensor:
        """One optimizer step, on a GPU only queued: total loss, its three parts, gradient norm, and whether to stop.

        All are means over the processes; the last is above 0 where the time of one is up or a signal came to it.
        """
        settings = self.config.train
        rate = learning_rate(settings, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        images = [batch[key].to(self.device, non_blocking=True) for key in ("ir", "vi_y")]
        if self.gradients is None:
            # On a GPU a graph is replayed: the step is thousands of launches. torch.compile's code is left out of it.
            graph = self.device.type == "cuda" and not settings.compile
            self.gradients = captured(self._gradients, *images) if graph else self._gradients
        # Stochastic depth draws from a stream of this step's own.
        stream = np.random.SeedSequence((settings.seed, self.step, self.rank)).generate_state(1, np.uint64)
        torch.manual_seed(int(stream[0]))
        message = self.gradients(*images)
        late = settings.max_minutes > 0 and time.monotonic() - self.started > 60 * settings.max_minutes
        message[-1] = late or bool(self.stopped)
        if self.world > 1:
            dist.all_reduce(message)
            message /= self.world
        gradient, parts, late = message.tensor_split([-5, -1])
        norm = gradient.norm(keepdim=True)
        if settings.clip_norm > 0:
            gradient *= (settings.clip_norm / (norm + 1e-6)).clamp(max=1)
        values = torch.cat([parts, norm, late])
        # Before anyone looks at the loss: where it is not finite the run ends, and nothing of the step is saved.
        self.optimizer.step()
        if self.averaged is not None:
            if self.step == 0:
                self.averaged.update_parameters(self.model)
            else:  # what that does by now, but without waiting for the device to read a number of its own
                averages, values_now = (list(module.parameters()) for module in (self.averaged, self.model))
                self.averaged.multi_avg_fn(averages, values_now, None)
        return values

    def _finish_step(self, values: torch.Tensor, names: list[str]) -> tuple[dict, bool]:
        """Returns the step's log record and whether the time is up, the same on every process."""
        total, ssim, texture, intensity, norm, late = values.tolist()
        if not math.isfinite(total + norm):
            self._stop_diverged(total, norm, names)
        self.step += 1
        record = {"step": self.step, "epoch": (self.step - 1) // len(self.batches) + 1, "loss": total, "ssim": ssim}
        record |= {"texture": texture, "intensity": intensity, "gradient_norm": norm}
        record["lr"] = self.optimizer.param_groups[0]["lr"]
        return record, late > 0

    def _gradients(self, ir: torch.Tensor, vi: torch.Tensor) -> torch.Tensor:
        """One vector, as the network is small: a batch's gradients, total loss and its three parts, and a free place.

        The parameters' gradients are parts of it, so that what is done to them there, the optimizer sees.
        """
        self.network.train()
        self.optimizer.zero_grad()
        with self._autocast():
            fused = self.network(ir, vi)
        parts = self.loss(fused, ir, vi)
        parts["total"].backward()
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        values = [*(value.detach() for value in parts.values()), parts["total"].new_zeros(())]
        message = torch.cat([each.flatten() for each in (*(parameter.grad for parameter in parameters), *values)])
        pieces = message.split([*(parameter.numel() for parameter in parameters), len(values)])
        for parameter, piece in zip(parameters, pieces[:-1], strict=True):
            parameter.grad = piece.view_as(parameter)
        return message

    def _fit_steps(self, done: int) -> None:
        """Ends the schedule within train.fit_minutes, from the time of the steps that this process has done so far.

        The number is chosen once and saved: a resumed run keeps it.
        """
        if done == WARM_STEPS:
            self.timed_from = time.monotonic()
        if done == WARM_STEPS + TIMED_STEPS:
            now = time.monotonic()
            left = 60 * self.config.train.fit_minutes * (1 - RESERVE) - (now - self.started)
            fitting = torch.tensor(self.step + max(0.0, left) * TIMED_STEPS / (now - self.timed_from))
            if self.world > 1:
                fitting = fitting.to(self.device)
                dist.all_reduce(fitting, dist.ReduceOp.MIN)
            self.total_steps = self.fitted_steps = min(self.total_steps, int(fitting.item()))

    def _after_step(self, record: dict, stop: bool) -> None:
        if self.log is not None:
            _write_line(self.log, record)
        if self.board is not None and self.step % self.config.logging.scalar_steps == 0:
            for name in ("loss", "ssim", "texture", "intensity", "gradient_norm", "lr"):
                self.board.add_scalar(f"train/{name}", record[name], self.step)
        last = self.step >= self.total_steps
        validating = last or self.step % (len(self.batches) * self.config.train.validate_epochs) == 0
        if validating:
            self._validate()
        if validating or stop or self.step % self.config.train.save_steps == 0:
            self.save()

    @torch.no_grad()
    def _validate(self) -> None:
        """Loss and fusion metrics of the whole validation pairs; keeps the weights when they are the best so far."""
        network = self._weights_to_keep().eval()
        scores = {}
        for index in range(self.rank, len(self.validation_pairs), self.world):
            pair = self.validation_pairs[index]
            ir, vi = (pair[key][None].to(self.device) for key in ("ir", "vi_y"))
            with self._autocast():
                fused = network(ir, vi)
            metrics = evaluate_pair(*(to_uint8(image[0]) for image in (fused, ir, vi)))
            scores[index] = {"loss": self.loss(fused, ir, vi)["total"].item(), **metrics}
            if self.board is not None and index < self.config.logging.images:
                self.board.add_image(f"validation/{pair['name']}", torch.cat([ir, vi, fused], dim=-1)[0], self.step)
        if self.world > 1:
            gathered = [None] * self.world
            dist.all_gather_object(gathered, scores)
            scores = {index: each for part in gathered for index, each in part.items()}
        means = {name: float(np.mean([scores[index][name] for index in sorted(scores)])) for name in ("loss", *METRICS)}
        score = -means["loss"] if self.score_names == ["loss"] else sum(means[name] for name in self.score_names)
        self.validations += 1
        better = self.best is None or math.isnan(self.best) or score > self.best
        if better:
            self.best = score
        if self.rank == 0:
            _write_line(self.validation_log, {"step": self.step, "best": better, **means})
            shown = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
            tqdm.write(f"validation at step {self.step}: {shown}{' (best)' if better else ''}", file=sys.stderr)
            if better:
                save_model(self.folder / "best.safetensors", network)
        if self.board is not None:
            for name, value in means.items():
                self.board.add_scalar(f"validation/{name}", value, self.step)

    def save(self) -> None:
        """Writes the run's state, its weights and its record."""
        if self.rank == 0:
            info = {"step": self.step, "validations": self.validations, "best": self.best}
            info |= {"fitted_steps": self.fitted_steps, "training_pairs": len(self.crops), "names": self.names}
            info |= {"global_batch": self.global_batch, "config": to_dict(self.config)}
            save_model(self.folder / "last.safetensors", self._weights_to_keep())
            save_training_state(self.folder / "state.safetensors", self.model, self.optimizer, self.averaged, info)
            self.record |= {"steps": self.step, "planned_steps": self.total_steps, "images_per_second": self.rate}
            with atomic_write(self.folder / "run.json") as file:
                file.write(json.dumps(self.record | {"config": info["config"]}, indent=1).encode())

    def _weights_to_keep(self) -> DIFFMF:
        return self.model if self.averaged is None else self.averaged.module

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16")

    def _stop_diverged(self, loss: float, norm: float, names: list[str]) -> None:
        if self.world > 1:
            gathered = [None] * self.world
            dist.all_gather_object(gathered, list(names))
            names = [name for part in gathered for name in part]
        last = self.folder / "last.safetensors"
        raise UserError(
            f"loss {loss:g}, gradient norm {norm:g} at step {self.step + 1}, in the batch {', '.join(names)}; "
            f"last good checkpoint: {last if last.exists() else 'none saved yet'}"
        )


@contextlib.contextmanager
def _processes(device: str | None):
    """(rank, world size, device) of this process, joined to torchrun's group where there is one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = select_device(device)
    if chosen.type == "cuda":
        if world > 1:
            chosen = select_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(chosen)
    if world == 1:
        yield 0, 1, chosen
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), world, chosen
    finally:
        dist.destroy_process_group()


def _check_continues(path: Path, info: dict, saved: Config, config: Config, world: int) -> None:
    if config.model != saved.model:
        raise UserError(f"{path}: model settings cannot change; the run has {_others(saved.model, config.model)}")
    if config.train.weights != saved.train.weights:
        raise UserError(f"train.weights: the run began with {saved.train.weights or 'random ones'}")
    if config.train.ema != saved.train.ema and 0 in (config.train.ema, saved.train.ema):
        raise UserError(f"train.ema: the run has {saved.train.ema:g}, averaging cannot start or end in mid-run")
    if config.data.batch_size * world != info["global_batch"]:
        raise UserError(
            f"data.batch_size: {config.data.batch_size} on {world} processes, but the run to resume has a global batch "
            f"of {info['global_batch']}"
        )


def _score_names(best_by: str) -> list[str]:
    names = best_by.split("+")
    if names != ["loss"] and not set(names) <= set(METRICS):
        raise UserError(
            f"train.best_by: expected loss, or metrics joined by + ({', '.join(METRICS)}), found {best_by!r}"
        )
    return names


def _others(found: ModelConfig, expected: ModelConfig) -> str:
    """The settings in which two networks differ: "d_model 16 (expected 32), ..."."""
    pairs = {name: (getattr(found, name), getattr(expected, name)) for name in vars(found)}
    return ", ".join(f"model.{name} {a} (expected {b})" for name, (a, b) in pairs.items() if a != b)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[list[int]]:
    """A list that the first Ctrl-C or SIGTERM is put in instead of ending the process; a second one ends it."""
    came: list[int] = []

    def note(number, frame):
        came.append(number)
        restore()

    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, note) for number in signals}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield came
    finally:
        restore()


def _write_line(file, record: dict) -> None:
    try:
        file.write(json.dumps(record).encode() + b"\n")
    except OSError as error:
        raise UserError(f"{file.name}: cannot be written ({error.strerror or error})") from error


def _reopen(path: Path, lines: int):
    """Opens a log for appending after its first lines, unbuffered. Raises UserError when it cannot be written."""
    kept = path.read_text(encoding="utf-8").splitlines(keepends=True)[:lines] if path.exists() else []
    with atomic_write(path) as file:
        file.write("".join(kept).encode())
    return open(path, "ab", buffering=0)


def _summary_writer(folder: Path, step: int):
    """A TensorBoard writer, or None after saying so where the package is missing: the JSON logs have every number."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        print(
            f"no TensorBoard curves: {error} (pip install tensorboard, or logging.tensorboard=false)", file=sys.stderr
        )
        return None
    return SummaryWriter(folder, purge_step=step)
