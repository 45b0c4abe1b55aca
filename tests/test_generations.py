"""Born-again networks by the command line: each generation taught by the last."""

import itertools
import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from lightning_kd.cli import main
from lightning_kd.models import Averaged, pretrained

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def breed(tmp_path):
    def go(*args, config="configs/digits/born_again.yaml"):
        main(
            [
                "generations",
                "-c",
                config,
                f"--trainer.default_root_dir={tmp_path / 'run'}",
                "--trainer.max_epochs=1",
                "--data.subset=256",
                "--trainer.enable_progress_bar=false",
                "--trainer.accelerator=cpu",
                *args,
            ]
        )
        return json.loads((tmp_path / "run" / "generations.json").read_text())

    return go


def config_of(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


def test_each_generation_is_taught_by_the_last_and_a_second_call_goes_on(breed, tmp_path, capfd):
    run = tmp_path / "run"
    breed("--count=1")
    first = (run / "generation_1/student.safetensors").stat().st_mtime_ns
    found = breed("--count=2")
    assert f"{run}/generation_1 is finished" in capfd.readouterr().out
    assert (run / "generation_1/student.safetensors").stat().st_mtime_ns == first
    students = [each["student"] for each in found["generations"]]
    assert students == [str(run / f"generation_{k}/student.safetensors") for k in (1, 2)]
    (teacher,) = config_of(run / "generation_2")["model"]["init_args"]["teachers"]
    assert teacher["init_args"]["checkpoint"] == students[0]
    seeds = [config_of(run / f"generation_{k}")["seed_everything"] for k in (1, 2)]
    assert seeds == [1, 2]  # the teacher's was 0
    # what was measured is what the networks say
    from lightning_kd.data import Digits

    data = Digits(batch_size=64, crop_padding=1, subset=256)
    data.setup("fit")
    images, labels = data._val
    networks = [pretrained(s) for s in students]
    for network, accuracy in (
        (networks[0], found["generations"][0]["accuracy"]),
        (networks[1], found["generations"][1]["accuracy"]),
        (Averaged(networks).eval(), found["ensemble"]),
    ):
        right = network(images.float() / 255).argmax(1) == labels
        assert right.float().mean().item() == pytest.approx(accuracy)
    # the ensemble is a network to test
    cli = main(["test", "-c", str(run / "ensemble.yaml")])
    assert cli.trainer.callback_metrics["test/accuracy"] > 0

    # a generation that was interrupted goes on from its last checkpoint
    (run / "generation_2/student.json").unlink()
    breed("--count=2")
    assert (run / "generation_2/student.json").is_file()
    assert "Restored all states" in capfd.readouterr().err
    # other options are not taken for these, nor is a pupil of another teacher
    with pytest.raises(FileExistsError, match="generation_1 holds a generation with other options"):
        breed("--count=2", "--model.task_weight=0.3")
    weights = load_file(students[0])
    save_file(weights, students[0], {"trained": "anew"})
    with pytest.raises(FileExistsError, match="generation_2 holds a generation with other options"):
        breed("--count=2")


def test_options_of_the_first_teachers_stay_with_them(breed, tmp_path):
    """None of their options reaches the second generation's teacher."""
    run = tmp_path / "run"
    config = yaml.safe_load((ROOT / "configs/digits/born_again.yaml").read_text())
    config["model"]["init_args"]["teachers"][0]["init_args"] |= {"mean": [0.3], "std": [0.25]}
    cache = {"class_path": "lightning_kd.teachers.TeacherCache"}
    config["data"]["init_args"]["teacher_cache"] = {
        **cache, "init_args": {"folder": str(tmp_path / "answers")},
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    other = "configs/digits/teachers/resnet20.safetensors"
    breed("--count=2", f"--model.teachers.checkpoint={other}", config=str(tmp_path / "c.yaml"))
    first, second = (
        config_of(run / f"generation_{k}")["model"]["init_args"]["teachers"][0]["init_args"]
        for k in (1, 2)
    )
    assert (first["checkpoint"], first["mean"]) == (other, [0.3])
    assert second["checkpoint"] == str(run / "generation_1/student.safetensors")
    assert second["mean"] is second["std"] is second["network"] is None
    assert sorted(p.name for p in (tmp_path / "answers").iterdir()) == [
        "generation_1", "generation_2",
    ]  # fmt: skip


def test_generations_that_are_no_better_end_it(breed, tmp_path):
    # a learning rate of 0 and a network that stays as it is: no generation differs in accuracy
    found = breed(
        "--count=4", "--until_worse", "--model.optimizer.lr=0.0", "--trainer.max_epochs=1",
    )  # fmt: skip
    accuracies = [each["accuracy"] for each in found["generations"]]
    better = [b > a for a, b in itertools.pairwise(accuracies)]
    assert all(better[:-1])
    assert 1 <= len(accuracies) <= 4


def test_mistakes_are_reported(breed, tmp_path, capsys):
    for config in ("teacher", "tree"):
        with pytest.raises(ValueError, match="learns from a teacher"):
            breed(config=f"configs/digits/{config}.yaml")
    with pytest.raises(SystemExit):
        breed("--count=0")
    assert "expected --count >= 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["generations", "-c", "nowhere.yaml"])
    with pytest.raises(ValueError, match="validation images with --until_worse"):
        breed("--until_worse", "--data.val_split=0")
    with pytest.raises(ValueError, match="Expected the callback"):
        breed("--trainer.callbacks=null")
    with pytest.raises(ChildProcessError, match="the generations before it are kept"):
        breed("--count=1", "--model.optimizer.lr=1e30", "--trainer.max_epochs=3")
    with pytest.raises(SystemExit):
        main(["generations", "--help"])
    assert "born-again" in capsys.readouterr().out
