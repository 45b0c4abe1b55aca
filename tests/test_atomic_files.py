"""Files are whole or not there; damaged and malicious ones are told, and nothing is lost."""

import os
import pickle
import resource
import signal
import struct
import threading

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_kd.atomic_files import HOST, write_atomically, written_atomically
from lightning_kd.callbacks import SaveOnSigterm
from lightning_kd.callbacks import keep_freed_memory as memory
from lightning_kd.cli import main
from lightning_kd.models import pretrained, resnet8
from lightning_kd.modules.checkpoint_io import DurableCheckpointIO


class Bomb:
    """Leaves a trace if it is ever unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


@pytest.fixture
def small_files():
    """No file may grow beyond 20 kB: as good as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, old)


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "deep" / "x.json"
    write_atomically(path, b"first")

    def fail():
        with written_atomically(path) as file:
            file.write(b"sec")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"first"
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_what_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Cannot write .*file/x: .* as it was"):
        write_atomically(tmp_path / "file" / "x", b"")


def test_a_full_disk_loses_no_checkpoint(make_module, make_trainer, digits, tmp_path, small_files):
    class Fill(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 2:
                small_files()

    saver = ModelCheckpoint(tmp_path / "kept", filename="last", enable_version_counter=False)
    trainer = make_trainer(
        plugins=[DurableCheckpointIO()],
        enable_checkpointing=True,
        callbacks=[saver, Fill()],
        max_epochs=3,
    )
    with pytest.raises(OSError, match=r"Cannot write .*last.ckpt: .*[Ff]ile") as told:
        trainer.fit(make_module(), datamodule=digits())
    assert "as it was" in str(told.value)
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["last.ckpt"]
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft[1], soft[1]))
    assert (
        torch.load(saver.last_model_path or saver.best_model_path, weights_only=True)["epoch"] == 1
    )
    again = make_trainer(plugins=[DurableCheckpointIO()], max_epochs=3)
    again.fit(make_module(), datamodule=digits(), ckpt_path=tmp_path / "kept" / "last.ckpt")
    assert again.current_epoch == 3


def test_the_command_line_asks_for_what_a_python_user_asks_for_by_a_line(
    make_module, make_trainer, digits, monkeypatch, tmp_path
):
    """Durable checkpoints, a checkpoint at SIGTERM, memory that is kept: nothing of it unasked."""
    asked = []
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: asked.append(1))
    trainer = make_trainer(max_epochs=1)
    trainer.fit(make_module(), datamodule=digits())
    assert type(trainer.strategy.checkpoint_io) is TorchCheckpointIO
    assert not asked
    assert not any(isinstance(c, SaveOnSigterm) for c in trainer.callbacks)
    folder = f"--trainer.default_root_dir={tmp_path}"
    config = ["-c", "configs/digits/single_teacher.yaml", folder, "--trainer.accelerator=cpu"]
    quick = ["--trainer.fast_dev_run=true", "--trainer.enable_progress_bar=false"]
    cli = main(["fit", *config, *quick])
    assert type(cli.trainer.strategy.checkpoint_io) is DurableCheckpointIO
    assert asked == [1]
    assert any(isinstance(c, SaveOnSigterm) for c in cli.trainer.callbacks)
    plugin = "--trainer.plugins=lightning.pytorch.plugins.io.TorchCheckpointIO"
    cli = main([*config, plugin], run=False)
    assert type(cli.trainer.strategy.checkpoint_io) is TorchCheckpointIO


@pytest.fixture
def saved(make_module, make_trainer, digits, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = make_trainer(
        plugins=[DurableCheckpointIO()], enable_checkpointing=True, callbacks=[saver], max_epochs=1
    )
    trainer.fit(make_module(), datamodule=digits())
    older, newer = (tmp_path / f"step={n}.ckpt" for n in (2, 4))
    os.utime(older, (1, 1))
    return older, newer


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_truncated_checkpoint_is_reported_and_an_older_one_offered(
    kept, saved, make_module, make_trainer, digits
):
    older, newer = saved
    content = newer.read_bytes()
    newer.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    message = rf"step=4.ckpt is damaged or not a checkpoint .* {older} can be read\."
    with pytest.raises(ValueError, match=message):
        make_trainer(plugins=[DurableCheckpointIO()]).fit(
            make_module(), datamodule=digits(), ckpt_path=newer
        )
    make_trainer(plugins=[DurableCheckpointIO()]).fit(
        make_module(), datamodule=digits(), ckpt_path=older
    )


def test_a_malicious_checkpoint_is_refused(saved, make_module, make_trainer, digits, tmp_path):
    _, newer = saved
    trace = tmp_path / "trace"
    content = torch.load(newer, weights_only=True)
    torch.save(content | {"loops": Bomb(trace)}, newer)
    with pytest.raises(ValueError, match="needs pickle to load, which can run any code"):
        make_trainer(plugins=[DurableCheckpointIO()]).fit(
            make_module(), datamodule=digits(), ckpt_path=newer
        )
    newer.write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        make_trainer(plugins=[DurableCheckpointIO()]).fit(
            make_module(), datamodule=digits(), ckpt_path=newer
        )
    assert not trace.exists()


def test_the_command_line_tells_a_damaged_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    (tmp_path / "x.ckpt").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ValueError, match=r"x.ckpt is damaged or not a checkpoint"):
        main(["fit", "-c", "configs/digits/single_teacher.yaml", f"--ckpt_path={tmp_path}/x.ckpt"])


def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "run"  # a folder without rights stops no administrator
    config = "configs/digits/single_teacher.yaml"
    with pytest.raises(OSError, match=rf"Cannot write into {folder}: Not a directory. Choose"):
        main(["fit", "-c", config, f"--trainer.default_root_dir={folder}"])


def test_a_checkpoint_that_is_not_there_is_told_with_those_that_are(tmp_path, monkeypatch):
    monkeypatch.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    config = "configs/digits/single_teacher.yaml"
    wrong = tmp_path / "lst.ckpt"
    with pytest.raises(FileNotFoundError, match=r"lst.ckpt, found none. In .*: no checkpoints"):
        main(["fit", "-c", config, f"--ckpt_path={wrong}"])
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(FileNotFoundError, match=r"lst.ckpt, found none. In .*: last.ckpt"):
        main(["fit", "-c", config, f"--ckpt_path={wrong}"])


def test_a_run_that_replaces_another_leaves_none_of_its_checkpoints(tmp_path, monkeypatch):
    """Else one that breaks off early would seem to have left them."""
    monkeypatch.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    old = tmp_path / "checkpoints" / "old.ckpt"
    old.parent.mkdir()
    old.touch()
    (tmp_path / "config.yaml").touch()
    args = [
        "fit", "-c", "configs/digits/single_teacher.yaml", "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=1", f"--trainer.default_root_dir={tmp_path}",
        "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    with pytest.raises(FileExistsError):
        main(args)
    assert old.exists()
    main([*args, "--overwrite=true"])
    assert not old.exists()


@pytest.mark.parametrize("size", [2**62, 10**9, 2**20])
def test_absurd_sizes_in_a_safetensors_file_are_refused(size, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", size) + b'{"a": 1}')
    with pytest.raises(ValueError, match="truncated or not a safetensors"):
        pretrained(str(path), resnet8())
    header = b'{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,8]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match="truncated or not a safetensors"):
        pretrained(str(path), resnet8())


def test_writers_of_one_file_do_not_mix(tmp_path):
    """Whoever is last wins, and every reader finds one of them whole."""
    path, seen, done = tmp_path / "f", set(), threading.Event()

    def write(letter):
        for _ in range(60):
            write_atomically(path, letter * 200_000)

    write(b"a")

    def read():
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in (reader, *writers):
        thread.start()
    for writer in writers:
        writer.join()
    done.set()
    reader.join()
    assert seen <= {letter * 200_000 for letter in (b"a", b"b", b"c")}
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_what_killed_writers_left_is_removed_and_what_living_ones_write_is_not(tmp_path):
    dead, alive = f".f.{HOST}-999999999-1.partial", f".f.{HOST}-{os.getppid()}-1.partial"
    other = ".f.elsewhere-999999999-1.partial"
    for name in (dead, alive, other):
        (tmp_path / name).touch()
    write_atomically(tmp_path / "f", b"x")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["f", alive, other])


def test_a_planted_link_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    name = f".f.{HOST}-{os.getpid()}-{threading.get_ident()}.partial"
    (tmp_path / name).symlink_to(victim)
    write_atomically(tmp_path / "f", b"x")
    (tmp_path / "g").symlink_to(victim)
    write_atomically(tmp_path / "g", b"x")
    assert victim.read_bytes() == b"mine"
