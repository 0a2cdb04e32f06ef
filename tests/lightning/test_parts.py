"""Machine, schedules, logger, panel, random state, and that nothing heavy is imported early."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, RichProgressBar

from connectomics.config.schema import OptimizerConfig, SchedulerConfig
from connectomics.errors import ConfigError
from connectomics.lightning.callbacks import BestCheckpoint
from connectomics.lightning.devices import Machine, choose_machine, set_threads
from connectomics.lightning.metrics_table import MetricsTable
from connectomics.lightning.optim import build_optimizer, learning_rate
from connectomics.lightning.panels import Plane, panel
from connectomics.lightning.resuming import RandomState, random_state, set_random_state
from connectomics.lightning.timing import LossBar, PlainProgress
from connectomics.lightning.trainer import build_trainer
from connectomics.machine import cpu_has_bfloat16, is_first_process
from tests.lightning.synthetic_run import tiny_config


def test_the_package_and_train_import_no_torch() -> None:
    code = (
        "import sys; import connectomics.lightning, connectomics.pipeline.train; "
        "assert not {'torch', 'pytorch_lightning', 'monai'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class TestMachine:
    @pytest.mark.parametrize(
        ("asked", "there", "expected", "said"),
        [
            (4, 4, ("gpu", 4, "16-mixed"), []),
            (4, 2, ("gpu", 2, "16-mixed"), ["requested 4 GPUs, but only 2 are available: training on 2 GPUs"]),
            (2, 1, ("gpu", 1, "16-mixed"), ["requested 2 GPUs, but only 1 is available: training on 1 GPU"]),
            (1, 8, ("gpu", 1, "16-mixed"), []),
            (
                1,
                0,
                ("cpu", 1, "32"),
                ["requested 1 GPU, but none is available: training on the CPU", "using 32 on the CPU"],
            ),
            (0, 8, ("cpu", 1, "32"), ["using 32 on the CPU"]),
        ],
    )
    def test_what_is_asked_for_and_what_there_is(
        self, asked: int, there: int, expected: tuple[str, int, str], said: list[str]
    ) -> None:
        config = tiny_config(system__accelerator="auto", system__num_gpus=asked, training__precision="16-mixed")
        machine = choose_machine(config, there, bf16_cpu=False)
        assert (machine.accelerator, machine.devices, machine.precision) == expected
        assert len(machine.notes) == len(said)
        assert all(part in note for part, note in zip(said, machine.notes, strict=True))
        assert machine.strategy == ("ddp" if machine.devices > 1 else "auto")

    def test_accelerator(self) -> None:
        on_cpu = choose_machine(tiny_config(system__num_gpus=2, system__cpu_processes=3), 2, bf16_cpu=True)
        assert (on_cpu.accelerator, on_cpu.devices, on_cpu.notes) == ("cpu", 3, ())
        on_gpu = choose_machine(tiny_config(system__accelerator="gpu", system__num_gpus=0), 2, bf16_cpu=True)
        assert (on_gpu.accelerator, on_gpu.devices) == ("gpu", 1)

    @pytest.mark.parametrize(("bf16", "expected"), [(True, "bf16-mixed"), (False, "32")])
    @pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
    def test_the_cpu_computes_in_what_it_has_instructions_for(self, precision: str, bf16: bool, expected: str) -> None:
        machine = choose_machine(tiny_config(training__precision=precision), 0, bf16_cpu=bf16)
        assert machine.precision == expected
        assert bool([n for n in machine.notes if precision in n]) == (precision != expected)

    def test_processes_and_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[int] = []
        monkeypatch.setattr(torch, "set_num_threads", seen.append)
        assert set_threads(tiny_config(system__num_cpus=1), 1) == 1
        assert set_threads(tiny_config(system__num_cpus=999), 1) <= 999
        assert set_threads(tiny_config(system__num_cpus=1), 4) == 1
        assert len(seen) == 3
        assert isinstance(cpu_has_bfloat16(), bool)
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert not is_first_process()


class TestSchedules:
    def test_warm_up_is_linear_then_the_shape_begins(self) -> None:
        config = SchedulerConfig(name="cosine", min_lr=0.1)
        rates = [learning_rate(config, 1.0, epoch / 2, epoch / 10) for epoch in (0.5, 1, 2, 6, 10, 11)]
        assert rates == pytest.approx([0.25, 0.5, 1.0, 0.55, 0.1, 0.1])

    def test_polynomial(self) -> None:
        config = SchedulerConfig(name="polynomial", power=0.9)
        assert learning_rate(config, 1.0, math.inf, 0.25) == pytest.approx(0.75**0.9)

    def test_constant_needs_no_end(self) -> None:
        assert learning_rate(SchedulerConfig(), 0.3, math.inf, 0.0) == 0.3

    def test_biases_and_norms_may_have_no_weight_decay(self) -> None:
        network = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3), torch.nn.BatchNorm3d(2), torch.nn.Linear(2, 2))
        config = OptimizerConfig(weight_decay=0.25, decay_norm_and_bias=False)
        decayed, plain = build_optimizer(network.parameters(), config).param_groups
        assert (decayed["weight_decay"], plain["weight_decay"]) == (0.25, 0.0)
        assert {id(p) for p in decayed["params"]} == {id(network[0].weight), id(network[2].weight)}
        assert len(plain["params"]) == 4

    @pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
    def test_optimizers(self, name: str) -> None:
        config = OptimizerConfig(name=name, lr=0.5, weight_decay=0.25, momentum=0.8, betas=[0.7, 0.9])
        optimizer = build_optimizer([torch.nn.Parameter(torch.ones(1))], config)
        group = optimizer.param_groups[0]
        assert type(optimizer).__name__ == name
        assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)
        assert group["momentum"] == 0.8 if name == "SGD" else tuple(group["betas"]) == (0.7, 0.9)


class TestMetricsTable:
    def test_new_columns_come_behind_and_rows_stay(self, tmp_path: Path) -> None:
        table = MetricsTable(tmp_path / "run" / "metrics.csv")
        table.log_metrics({"train/loss": 0.5, "epoch": 0}, 0)
        table.log_metrics({"val/dice": 0.25, "epoch": 0}, 3)
        assert table.path.read_text().splitlines() == [
            "epoch,step,train/loss,val/dice",
            "0,0,0.5,",
            "0,3,,0.25",
        ]

    def test_a_resumed_run_goes_on_and_forgets_what_it_will_repeat(self, tmp_path: Path) -> None:
        first = MetricsTable(tmp_path / "metrics.csv")
        for step in range(5):
            first.log_metrics({"epoch": step // 2, "train/loss": 1.0 / (step + 1)}, step)
        again = MetricsTable(tmp_path / "metrics.csv")
        again.remove_from(4)
        again.log_metrics({"epoch": 2, "val/dice": 0.5}, 4)
        assert [row["step"] for row in again.rows()] == ["0", "1", "2", "3", "4"]
        assert again.rows()[-1] == {"epoch": "2", "step": "4", "train/loss": "", "val/dice": "0.5"}
        assert again.experiment == again.path


class TestPanel:
    def test_rows_are_classes_and_columns_are_views(self) -> None:
        raw = np.full((8, 12), 0.5, np.float32)
        label, known, probability = np.zeros((3, 2, 8, 12), np.float32)
        label[0, :, :6] = 1
        known[:, :4] = 1
        probability[1, :, 6:] = 1
        image = panel(Plane("x", raw, label, known.astype(bool), probability))
        assert image.shape == (2 * 8 + 4, 4 * 12 + 3 * 4, 3)
        assert (image[0, 0] == 128).all()  # raw
        green, plain, unknown = image[0, 16], image[0, 16 + 8], image[6, 16]
        assert green[1] > green[0]
        assert (plain == 128).all()
        assert unknown.max() < plain.max()
        assert (image[0, 32] == 255).all()  # known
        assert (image[7, 32] == 0).all()
        orange = image[12, 48 + 8]
        assert orange[0] > orange[2]

    def test_large_planes_are_thinned_and_rows_are_limited(self) -> None:
        raw = np.zeros((600, 300), np.float32)
        many = np.zeros((20, 600, 300), np.float32)
        assert panel(Plane("x", raw, many, many > 0, many)).shape == (16 * 200 + 15 * 4, 4 * 100 + 3 * 4, 3)


class TestRandomState:
    def test_all_generators_come_back(self) -> None:
        state = random_state()
        first = (random.random(), np.random.rand(), torch.rand(1), random.gauss(0, 1), np.random.randn())
        random.seed(3), np.random.seed(3), torch.manual_seed(3)
        set_random_state(state)
        assert (random.random(), np.random.rand(), torch.rand(1), random.gauss(0, 1), np.random.randn()) == first

    def test_another_number_of_processes_is_said(self, caplog: pytest.LogCaptureFixture) -> None:
        trainer: Any = SimpleNamespace(world_size=2, global_rank=0, is_global_zero=True)
        checkpoint = {"connectomics_random_state": [random_state()]}
        RandomState().on_load_checkpoint(trainer, None, checkpoint)  # type: ignore[arg-type]
        assert "the checkpoint has 1 process, this run has 2" in caplog.text


class TestTrainer:
    machine = Machine("cpu", 1, "32")

    def test_wandb_without_the_package(self, tmp_path: Path) -> None:
        pytest.importorskip("pytorch_lightning.loggers")
        try:
            import wandb  # noqa: F401
        except ModuleNotFoundError:
            with pytest.raises(ConfigError, match="pip install wandb"):
                build_trainer(tiny_config(logging__use_wandb=True), tmp_path, machine=self.machine)

    def test_patience_zero_never_stops_early(self, tmp_path: Path) -> None:
        trainer = build_trainer(tiny_config(early_stopping__patience=0), tmp_path, machine=self.machine)
        assert trainer.early_stopping_callback is None

    def test_a_bar_on_a_terminal_and_lines_elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for terminal, kind in ((True, RichProgressBar), (False, PlainProgress)):
            monkeypatch.setattr(sys.stdout, "isatty", lambda answer=terminal: answer)
            trainer = build_trainer(tiny_config(), tmp_path, machine=self.machine)
            assert any(isinstance(c, kind) for c in trainer.callbacks)

    def test_the_bar_reads_the_loss_once_a_second(self, monkeypatch: pytest.MonkeyPatch) -> None:
        values = iter(range(9))
        metrics = SimpleNamespace(get=lambda *_: next(values))
        trainer: Any = SimpleNamespace(progress_bar_metrics={}, loggers=[], callback_metrics=metrics)
        module: Any = None
        now = [0.0]
        monkeypatch.setattr("connectomics.lightning.timing.time.perf_counter", lambda: now[0])
        bar, shown = LossBar(), []
        for now[0] in (5.0, 5.9, 6.1):
            shown.append(bar.get_metrics(trainer, module)["train/loss_step"])
        assert shown == [0, 0, 1]

    def test_plain_progress_speaks_within_long_epochs(self, capsys: pytest.CaptureFixture[str]) -> None:
        trainer: Any = SimpleNamespace(
            is_global_zero=True,
            num_training_batches=40,
            max_epochs=3,
            current_epoch=1,
            callback_metrics={"train/loss_step": torch.tensor(0.25)},
        )
        progress = PlainProgress(every_s=0.0)
        progress.on_train_epoch_start(trainer, None)  # type: ignore[arg-type]
        progress.on_train_batch_end(trainer, None, None, {}, 4)  # type: ignore[arg-type]
        assert capsys.readouterr().out.startswith("epoch 2/3  batch 5/40  train/loss_step 0.2500  ")

    def test_best_is_copied_where_the_disk_has_no_links(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object) -> None:
            raise OSError("no links here")

        monkeypatch.setattr("os.link", refuse)
        (tmp_path / "epoch0000-dice0.5000.ckpt").write_bytes(b"weights")
        scored = ModelCheckpoint(dirpath=str(tmp_path))
        scored.best_model_path = str(tmp_path / "epoch0000-dice0.5000.ckpt")
        BestCheckpoint(scored).link(SimpleNamespace(is_global_zero=True))  # type: ignore[arg-type]
        assert (tmp_path / "best.ckpt").read_bytes() == b"weights"
