"""Training runs on a small random data set: resuming, several processes, divergence, logs and errors."""

import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffmf_model import cli
from diffmf_model import train as training
from diffmf_model.checkpoint import load_model, read_training_state
from diffmf_model.config import TrainConfig
from diffmf_model.loss import FusionLoss
from diffmf_model.train import EpochBatches, learning_rate
from diffmf_ops import modules

SETTINGS = [
    "model.d_model=4",
    "model.d_state=2",
    "model.stages=1",
    "data.crop_size=16",
    "data.batch_size=2",
    "train.lr=1e-3",
    "train.save_steps=2",
    "logging.tensorboard=false",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Seven pairs for training and one to validate."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(5)
    names = [f"pair{i}" for i in range(8)]
    for folder, shape in (("ir", (42, 45)), ("vi", (42, 45, 3))):
        (root / folder).mkdir()
        for name in names:
            Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(root / folder / f"{name}.png")
    (root / "splits").mkdir()
    (root / "splits" / "train.txt").write_text("\n".join(names[1:]))
    (root / "splits" / "val.txt").write_text(names[0])
    return root


def arguments(data, output, *more, device="cpu"):
    flags = [argument for argument in more if argument.startswith("--")]
    overrides = [argument for argument in more if argument not in flags]
    return ["train", "--data", str(data), "--output", str(output), "--device", device, *flags, *SETTINGS, *overrides]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_files(first, second):
    return all(
        (first / name).read_bytes() == (second / name).read_bytes()
        for name in ("last.safetensors", "best.safetensors", "state.safetensors", "log.jsonl", "validation.jsonl")
    )


def test_a_run_learns_and_leaves_its_files(data, tmp_path, capsys):
    more = ["train.epochs=8", "train.lr=1e-2", "logging.tensorboard=true", "logging.scalar_steps=5"]
    assert cli.main(arguments(data, tmp_path / "run", *more)) == 0
    log = lines(tmp_path / "run" / "log.jsonl")
    assert [record["step"] for record in log] == list(range(1, 25)) and log[3]["epoch"] == 2
    assert np.mean([r["loss"] for r in log[-6:]]) < 0.9 * np.mean([r["loss"] for r in log[:6]])
    weights = [10, 20, 20]
    for record in log:
        parts = [record[name] for name in ("ssim", "texture", "intensity")]
        assert record["loss"] == pytest.approx(np.dot(weights, parts), rel=1e-5)
    validations = lines(tmp_path / "run" / "validation.jsonl")
    scores = [v["VIF"] + v["Qabf"] + v["SSIM"] for v in validations]
    assert [v["step"] for v in validations] == list(range(3, 25, 3))
    assert [v["best"] for v in validations] == [s > max(scores[:i], default=-np.inf) for i, s in enumerate(scores)]
    assert load_model(tmp_path / "run" / "best.safetensors").config.d_model == 4
    assert f"step 24 of 24, best VIF+Qabf+SSIM {max(scores):.4f}" in capsys.readouterr().out
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [5, 10, 15, 20]
    assert events.Tags()["images"] == ["validation/pair0"]


def test_a_compiled_step_is_the_eager_one(data, tmp_path, monkeypatch):
    # Compiled code adds the two parts of a projected gradient one after the other: the eager run shall too.
    monkeypatch.setattr(modules, "is_plain", lambda arguments: False)
    compiled = []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(1) or compile_(module, backend="eager"))
    losses = []
    for name in ("false", "true"):
        assert cli.main(arguments(data, tmp_path / name, "train.epochs=1", f"train.compile={name}")) == 0
        losses.append([record["loss"] for record in lines(tmp_path / name / "log.jsonl")])
    assert losses[0] == losses[1] and compiled == [1]
    record = json.loads((tmp_path / "true" / "run.json").read_text())
    assert record["steps"] == record["planned_steps"] == 3 and record["images_per_second"] > 0
    assert record["config"]["train"]["compile"] is True and record["environment"]["torch"] == torch.__version__


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_captured_step_is_the_eager_one(data, tmp_path, monkeypatch, precision):
    more = [f"train.precision={precision}", "model.drop_path=0.3", "train.ema=0.5"]

    def losses(name, epochs, *flags):
        command = arguments(data, tmp_path / name, f"train.epochs={epochs}", *more, *flags, device="cuda")
        assert cli.main(command) == 0
        return [record["loss"] for record in lines(tmp_path / name / "log.jsonl")]

    graph = losses("graph", 3)
    losses("resumed", 1)  # captured anew at another step: stochastic depth still draws the same
    assert losses("resumed", 3, "--resume") == pytest.approx(graph, rel=1e-5)
    monkeypatch.setattr(training, "captured", lambda function, *inputs: function)
    assert losses("eager", 3) == pytest.approx(graph, rel=1e-5)


def test_bf16_follows_fp32(data, tmp_path):
    losses = []
    for precision in ("fp32", "bf16"):
        output = tmp_path / precision
        assert cli.main(arguments(data, output, "train.epochs=2", f"train.precision={precision}")) == 0
        losses.append([record["loss"] for record in lines(output / "log.jsonl")])
    assert losses[0] != losses[1]
    np.testing.assert_allclose(*losses, rtol=1e-2)  # measured up to 1e-3


def test_a_killed_run_resumes_bit_for_bit(data, tmp_path):
    more = ["train.epochs=4", "train.ema=0.8", "model.drop_path=0.3", "train.schedule=cosine", "train.warmup_steps=3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the killed process has: other thread counts sum in another order
    try:
        assert cli.main(arguments(data, tmp_path / "whole", *more)) == 0
        command = [sys.executable, "-m", "diffmf_model", *arguments(data, tmp_path / "killed", *more)]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        log = tmp_path / "killed" / "log.jsonl"
        enough = int(np.random.default_rng().integers(1, 10))
        deadline = time.monotonic() + 60
        while not (log.exists() and len(log.read_text().splitlines()) >= enough) and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert cli.main(arguments(data, tmp_path / "killed", "--resume", *more)) == 0
    finally:
        torch.set_num_threads(threads)
    assert same_files(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("stop_at", [1, 3, 4, 6])
def test_every_kind_of_stopping_point_resumes(data, tmp_path, monkeypatch, stop_at):
    """Stopped in the middle of an epoch, after a save and at a validation; the pieces equal the whole."""
    more = ["train.epochs=3", "train.ema=0.8"]
    assert cli.main(arguments(data, tmp_path / "whole", *more)) == 0

    class Stopped(Exception):
        pass

    def stop(trainer, record, stop, after=training.Trainer._after_step):
        if record["step"] == stop_at:
            raise Stopped
        after(trainer, record, stop)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(training.Trainer, "_after_step", stop)
        cli.main(arguments(data, tmp_path / "pieces", *more))
    assert cli.main(arguments(data, tmp_path / "pieces", "--resume", *more)) == 0
    assert same_files(tmp_path / "whole", tmp_path / "pieces")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resumes(data, tmp_path, monkeypatch, capsys, number):
    more = ["train.epochs=2", "train.save_steps=100"]
    assert cli.main(arguments(data, tmp_path / "whole", *more)) == 0

    def signalled(trainer, record, stop, after=training.Trainer._after_step):
        if record["step"] == 1:
            signal.raise_signal(number)
        after(trainer, record, stop)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "_after_step", signalled)
        assert cli.main(arguments(data, tmp_path / "pieces", *more)) == 130
    assert signal.getsignal(number) == before
    output = capsys.readouterr()
    assert "step 2 of 6" in output.out and "--resume continues towards 6" in output.out and "interrupted" in output.err
    assert cli.main(arguments(data, tmp_path / "pieces", "--resume", *more)) == 0
    assert same_files(tmp_path / "whole", tmp_path / "pieces")


def test_a_run_killed_before_its_first_checkpoint_keeps_its_settings(data, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(trainer):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training.Trainer, "train", killed)
        cli.main(arguments(data, tmp_path / "run", "train.epochs=1", "train.lr=5e-3"))
    assert cli.main(["train", "--data", str(data), "--output", str(tmp_path / "run"), "--resume"]) == 0
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert config["train"]["lr"] == 5e-3 and config["model"]["d_model"] == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_pictures_are_one_line(data, tmp_path, capsys, workers):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    (root / "ir" / "pair0.png").write_bytes((data / "ir" / "pair0.png").read_bytes()[:500])
    assert cli.main(arguments(root, tmp_path / "run", f"data.workers={workers}")) == 2
    assert "pair0.png: cannot be read as an image" in capsys.readouterr().err
    assert not (tmp_path / "run" / "log.jsonl").exists(), "validation pairs are read before the first step"
    for folder in ("ir", "vi"):
        Image.open(data / folder / "pair0.png").crop((0, 0, 45, 40)).save(root / folder / "pair0.png")
    assert cli.main(arguments(root, tmp_path / "run", f"data.workers={workers}")) == 2
    assert "validation pair pair0: metrics need at least 41 x 41 pixels, found (40, 45)" in capsys.readouterr().err
    for folder in ("ir", "vi"):
        shutil.copy(data / folder / "pair0.png", root / folder)
    (root / "vi" / "pair3.png").write_bytes((data / "vi" / "pair3.png").read_bytes()[:500])
    assert cli.main(arguments(root, tmp_path / "run", f"data.workers={workers}")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"diffmf: error: {root / 'vi' / 'pair3.png'}: cannot be read as an image"), error
    gc.collect()  # ends the workers now, not in a test that stands in for the clock by which PyTorch waits for them


def test_other_data_cannot_continue_a_run(data, tmp_path, capsys):
    assert cli.main(arguments(data, tmp_path / "run", "train.epochs=1")) == 0
    root = tmp_path / "data"
    shutil.copytree(data, root)
    (root / "splits" / "train.txt").write_text("\n".join(f"pair{i}" for i in range(1, 6)))
    assert cli.main(arguments(root, tmp_path / "run", "--resume")) == 2
    assert "--data: 5 training pairs, but the run has 7" in capsys.readouterr().err
    (root / "splits" / "train.txt").write_text("\n".join(f"pair{i}" for i in (2, 1, 3, 4, 5, 6, 7)))
    assert cli.main(arguments(root, tmp_path / "run", "--resume")) == 2
    assert f"--data: {root} has other training or validation pairs" in capsys.readouterr().err
    shutil.copy(data / "splits" / "train.txt", root / "splits")
    assert cli.main(arguments(root, tmp_path / "run", "--resume", "train.epochs=2")) == 0  # data may move


def test_a_best_score_is_forgotten_where_another_is_asked_for(data, tmp_path, capsys):
    def best(*more):
        assert cli.main(arguments(data, tmp_path / "run", *more)) == 0
        said = "best.safetensors is chosen anew" in capsys.readouterr().err
        return [record["best"] for record in lines(tmp_path / "run" / "validation.jsonl")], said

    assert best("train.epochs=1", "train.best_by=SD") == ([True], False)
    assert best("--resume", "train.epochs=2", "train.best_by=loss") == ([True, True], True)
    assert best("--resume", "train.epochs=3", "train.lr=0") == ([True, True, False], False)
    assert best("--resume", "train.epochs=4", "loss.ssim=90") == ([True, True, False, True], True)


def test_time_limit_saves_and_resumes(data, tmp_path, capsys):
    assert cli.main(arguments(data, tmp_path / "whole", "train.epochs=2")) == 0
    assert cli.main(arguments(data, tmp_path / "run", "train.epochs=2", "train.max_minutes=1e-9")) == 0
    assert "step 1 of 6; --resume continues towards 6" in capsys.readouterr().out
    assert cli.main(arguments(data, tmp_path / "run", "--resume", "train.max_minutes=0")) == 0
    weights = [load_file(tmp_path / run / "last.safetensors") for run in ("whole", "run")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_fitted_schedule_ends_in_time_and_resumes_bit_for_bit(data, tmp_path, monkeypatch, capsys):
    """A clock that advances by a second a step: of 0.2 minutes, 6 % in reserve, two warm and two timed steps."""
    monkeypatch.setattr(training, "WARM_STEPS", 2)
    monkeypatch.setattr(training, "TIMED_STEPS", 2)
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    step = training.Trainer._start_step

    def timed_step(trainer, batch):
        clock[0] += 1.0
        if trainer.step == stop_at:
            raise KeyboardInterrupt
        return step(trainer, batch)

    monkeypatch.setattr(training.Trainer, "_start_step", timed_step)
    more = ["train.epochs=40", "train.ema=0.8", "train.schedule=cosine", "train.fit_minutes=0.2"]
    clock, stop_at = [0.0], None
    assert cli.main(arguments(data, tmp_path / "whole", *more)) == 0
    log = lines(tmp_path / "whole" / "log.jsonl")
    assert len(log) == 11 and log[-1]["lr"] < 0.05 * log[0]["lr"]  # 0.94 * 12 s, of one second each
    assert lines(tmp_path / "whole" / "validation.jsonl")[-1]["step"] == 11
    assert "step 11 of 11, best" in capsys.readouterr().out
    clock, stop_at = [0.0], 7
    assert cli.main(arguments(data, tmp_path / "pieces", *more)) != 0
    clock, stop_at = [100.0], None
    assert cli.main(arguments(data, tmp_path / "pieces", "--resume", *more)) == 0
    assert same_files(tmp_path / "whole", tmp_path / "pieces")


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))],
)
def test_two_processes_equal_one_on_the_doubled_batch(data, tmp_path, device):
    def command(output, batch_size):
        more = ["train.epochs=3", "train.ema=0.5", f"data.batch_size={batch_size}"]
        return arguments(data, tmp_path / output, *more, device=device)

    assert cli.main(command("one", 2)) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "diffmf_model", *command("two", 1)],
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
        )
        for rank in "01"
    ]
    errors = [process.communicate(timeout=120)[1].decode() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    one, two = (read_training_state(tmp_path / run / "state.safetensors") for run in ("one", "two"))
    assert one[1]["step"] == two[1]["step"] == 9
    for name, value in one[0].items():
        if name.startswith(("model/", "averaged/module")):
            # Measured 1e-6 after nine Adam steps of 1e-3.
            assert (value - two[0][name]).abs().max() < 2e-5, name
    first, second = (lines(tmp_path / run / "log.jsonl") for run in ("one", "two"))
    np.testing.assert_allclose([r["loss"] for r in first], [r["loss"] for r in second], rtol=1e-5)
    first, second = (lines(tmp_path / run / "validation.jsonl") for run in ("one", "two"))
    assert first[-1]["Qabf"] == pytest.approx(second[-1]["Qabf"], rel=1e-2)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_divergence_names_step_pairs_and_checkpoint(data, tmp_path, monkeypatch, capsys, broken):
    calls = []

    def forward(self, fused, ir, vi, original=FusionLoss.forward):
        parts = original(self, fused, ir, vi)
        if self.calls_counted(fused) == 4:
            # sqrt has an infinite slope at zero and a finite value.
            parts["total"] = parts["total"] + (torch.nan if broken == "loss" else (fused - fused).sqrt().sum())
        return parts

    def calls_counted(self, fused):
        calls.append(fused.requires_grad)
        return sum(calls)

    monkeypatch.setattr(FusionLoss, "calls_counted", calls_counted, raising=False)
    monkeypatch.setattr(FusionLoss, "forward", forward)
    assert cli.main(arguments(data, tmp_path / "run", "train.epochs=3")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    found = "loss nan" if broken == "loss" else "gradient norm nan"
    assert found in error and "at step 4, in the batch pair" in error
    assert error.endswith(f"last good checkpoint: {tmp_path / 'run' / 'last.safetensors'}")
    assert len(lines(tmp_path / "run" / "log.jsonl")) == 3
    state, info = read_training_state(tmp_path / "run" / "state.safetensors")
    assert info["step"] == 3 and all(value.isfinite().all() for value in state.values())


def test_a_run_starts_from_given_weights(data, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli.main(arguments(data, first, "train.epochs=1")) == 0
    more = [f"train.weights={first / 'last.safetensors'}", "train.epochs=1", "train.lr=0"]
    assert cli.main(arguments(data, second, *more)) == 0
    assert (first / "last.safetensors").read_bytes() == (second / "last.safetensors").read_bytes()
    # A run that goes on does not need the file any more.
    (first / "last.safetensors").unlink()
    assert cli.main(arguments(data, second, *more, "train.epochs=2", "--resume")) == 0
    capsys.readouterr()
    assert cli.main(arguments(data, tmp_path / "third", "train.weights=full")) == 2
    assert "train.weights: full has model.d_model 32 (expected 4)" in capsys.readouterr().err


def test_epochs_visit_every_pair_once_and_processes_share_them():
    batches = [EpochBatches(11, 2, rank, 2, seed=3) for rank in range(2)]
    seen = []
    for epoch in range(2):
        for each in batches:
            each.set_position(epoch, 0)
        seen.append([index for each in batches for batch in each for index in batch])
        assert len(seen[-1]) == len(set(seen[-1])) == 8
    assert seen[0] != seen[1]
    single = EpochBatches(11, 4, 0, 1, seed=3)
    single.set_position(1, 1)
    for each in batches:
        each.set_position(1, 1)
    assert list(single) == [[index for each in batches for index in next(iter(each))]]


def test_learning_rate():
    config = TrainConfig(lr=2.0, warmup_steps=4, schedule="cosine")
    rates = [learning_rate(config, step, 24) for step in range(25)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[14] == pytest.approx(1.0) and rates[24] == pytest.approx(0.0)
    assert learning_rate(TrainConfig(lr=2.0), 20, 24) == 2.0


def test_wrong_use_is_one_line(data, tmp_path, capsys):
    def fails(expected, *more, output="run"):
        assert cli.main(arguments(data, tmp_path / output, *more)) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert expected in error[-1], error

    fails("data.batch_size", "data.batch_size=8")
    fails("train.best_by: expected loss, or metrics", "train.best_by=PSNR")
    fails("model.d_model: expected an integer", "model.d_model=x")
    assert cli.main(arguments(data, tmp_path / "run", "train.epochs=1")) == 0
    capsys.readouterr()
    fails("already holds a run; pass --resume")
    fails("model settings cannot change; the run has model.d_state 2 (expected 3)", "--resume", "model.d_state=3")
    fails("global batch of 2", "--resume", "data.batch_size=1")
    fails("averaging cannot start or end", "--resume", "train.ema=0.9")
    fails("train.weights: the run began with random ones", "--resume", "train.weights=small")
    fails("holds no run to resume", "--resume", output="another")
    fails("train.weights: small has model.d_model 16 (expected 4), ", "train.weights=small", output="tuned")
    path = tmp_path / "run" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    fails("not a safetensors file, or damaged", "--resume")
    assert cli.main(["train", "--data", str(tmp_path / "absent"), "--output", str(tmp_path / "other")]) == 2
    assert "no such folder" in capsys.readouterr().err
