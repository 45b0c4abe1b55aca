"""A run that a scheduler ends goes on as if nothing had been; nothing else touches its files."""

import os
import signal
import sys

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_kd import cli
from lightning_kd.callbacks import SaveOnSigterm
from lightning_kd.weighting import SelfPaced
from tests.conftest import assert_same_state


class Send(Callback):
    """SIGTERM to this process at a moment of the run."""

    def __init__(self, hook, count=1):
        self.left = count

        def send(*_):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)

        setattr(self, hook, send)


class Rows(Callback):
    """What validations found."""

    def __init__(self):
        self.rows = []

    def on_validation_epoch_end(self, trainer, module):
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            self.rows.append((trainer.current_epoch, float(metrics["val/accuracy"])))


@pytest.fixture
def fit(make_module, make_trainer, digits, tmp_path):
    def go(*callbacks, resume=None, **options):
        torch.manual_seed(0)
        data = digits(val_split=150)  # three batches
        data.shuffle_seed = 3
        rows = Rows()
        module = make_module(weighting=SelfPaced())
        trainer = make_trainer(
            callbacks=[rows, SaveOnSigterm(), *callbacks], **({"max_epochs": 3} | options)
        )
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        assert trainer.fast_dev_run or trainer.num_training_batches == STEPS
        return module, rows.rows

    return go


@pytest.fixture
def saver(tmp_path):
    return ModelCheckpoint(tmp_path / "kept", filename="best", save_top_k=0)


STEPS = 4  # batches of an epoch


@pytest.mark.parametrize("batch", [1, STEPS - 1, STEPS + 2, 2 * STEPS + 1])
def test_it_goes_on_behind_the_batch(fit, saver, tmp_path, batch):
    whole, rows = fit()
    with pytest.raises(SIGTERMException):
        fit(Send("on_train_batch_end", batch), saver, enable_checkpointing=True)
    again, late = fit(resume=tmp_path / "kept" / "last.ckpt")
    assert_same_state(again.state_dict(), whole.state_dict())
    assert late == [row for row in rows if row[0] >= batch // STEPS]


@pytest.mark.parametrize(("validation", "again_from"), [(1, 2), (3, 1)])
def test_at_the_end_of_an_epoch_its_validation_is_not_lost(fit, tmp_path, validation, again_from):
    """With one batch to validate it is done first; with more it is made up for."""
    whole, rows = fit(limit_val_batches=validation)
    keep = ModelCheckpoint(tmp_path / "kept", filename="last", enable_version_counter=False)
    with pytest.raises(SIGTERMException):
        fit(
            Send("on_train_batch_end", 2 * STEPS), keep, enable_checkpointing=True,
            limit_val_batches=validation,
        )  # fmt: skip
    again, late = fit(resume=tmp_path / "kept" / "last.ckpt", limit_val_batches=validation)
    assert_same_state(again.state_dict(), whole.state_dict())
    assert late == rows[again_from:]


def test_in_validation_the_checkpoint_before_stands(fit, tmp_path):
    whole, rows = fit()
    keep = ModelCheckpoint(tmp_path / "kept", filename="last", enable_version_counter=False)
    with pytest.raises(SIGTERMException):
        fit(
            # two batches before it trains, three behind the first epoch
            Send("on_validation_batch_start", 6), keep, enable_checkpointing=True,
        )  # fmt: skip
    again, late = fit(resume=tmp_path / "kept" / "last.ckpt")
    assert_same_state(again.state_dict(), whole.state_dict())
    assert late == rows[1:]


def test_what_is_no_training_leaves_the_checkpoint_alone(
    fit, saver, make_trainer, digits, tmp_path
):
    module, _ = fit()
    path = tmp_path / "kept" / "last.ckpt"
    path.parent.mkdir()
    path.write_text("of another run")
    with pytest.raises(SIGTERMException):
        fit(Send("on_train_batch_end"), saver, enable_checkpointing=True, fast_dev_run=2)
    tester = make_trainer(callbacks=[Send("on_test_batch_start"), saver], enable_checkpointing=True)
    with pytest.raises(SIGTERMException):
        tester.test(module, datamodule=digits(batch_size=100), verbose=False)
    assert path.read_text() == "of another run"


def test_another_exception_leaves_nothing(fit, saver, tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fit(Stop(), saver, enable_checkpointing=True)
    assert not (tmp_path / "kept" / "last.ckpt").exists()


@pytest.mark.parametrize("kept", [True, False])
def test_ctrl_c_says_what_stands(fit, tmp_path, caplog, kept):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt

    keep = ModelCheckpoint(tmp_path / "kept", filename="last", enable_version_counter=False)
    with pytest.raises(SystemExit):
        fit(*([keep] if kept else []), Stop(), enable_checkpointing=kept)
    said = "last.ckpt. To resume, add it as --ckpt_path." if kept else "There is no checkpoint yet."
    assert f"Interrupted.{'' if kept else ' '}" in caplog.text
    assert said in caplog.text


def test_the_command_ends_as_shells_expect(monkeypatch):
    def ended():
        raise SIGTERMException

    monkeypatch.setattr(cli, "main", ended)
    with pytest.raises(SystemExit) as end:
        cli.run()
    assert end.value.code == 128 + signal.SIGTERM
    assert sys.exc_info() == (None, None, None)
