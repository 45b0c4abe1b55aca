"""A misspelt word is told in two lines: its key, what is near, and how to see more."""

import pytest

from lightning_kd.cli import main
from tests.test_cli import ROOT


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


MISTAKES = {
    "--model.task_wieght=1": ["model.task_wieght", "'task_wieght'", "mean task_weight"],
    "--trainer.max_epcohs=3": ["--trainer.max_epcohs", "mean trainer.max_epochs"],
    "--trainer.max_epochs=hot": ["trainer.max_epochs", "Expected int", "Got hot"],
    "--model=lightning_kd.MultiTeachr": ["lightning_kd.MultiTeachr", "mean MultiTeacher"],
    "--model.losses+=lightning_kd.losses.SoftTargt": ["model.losses", "mean SoftTarget"],
    "--model.losses.kdd.temperature=6": ["model.losses.kdd.temperature", "new, or misspelt"],
    "--model.losses.soft_target.temprature=6": ["'temprature'", "mean temperature"],
    "--model.student.init_args.widht=3": ["model.student.init_args.widht", "mean width"],
    "--model.optimizer=torch.optim.SDG": ["model.optimizer", "torch.optim.SDG", "mean SGD"],
    "--model.weighting=Confidense": ["model.weighting", "'Confidense'", "mean Confidence"],
    "--data=Digts": ["data", "'Digts'", "mean Digits"],
    "--data.batch_sise=3": ["data.batch_sise", "mean batch_size"],
    "--data.batch_size=many": ["data.batch_size", "Expected int", "many"],
    "--trainer.callbacks+=ExportStudnet": ["trainer.callbacks", "mean ExportStudent"],
    "--config=configs/nope.yaml": ["nope.yaml"],
    "--sede_everything=3": ["--sede_everything", "mean seed_everything"],
    "--overwrite=perhaps": ["overwrite", "perhaps"],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_misspelt_word_is_told_in_two_lines(mistake, capsys, tmp_path):
    run = f"--trainer.default_root_dir={tmp_path}"
    with pytest.raises(SystemExit) as raised:
        main(["fit", "-c", "configs/digits/multi_teacher.yaml", run, mistake])
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line]
    assert raised.value.code == 2
    assert len(lines) == 2, said
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("help: lightning-kd ")
    assert len(lines[0]) < 300
    for word in MISTAKES[mistake]:
        assert word in lines[0], said
    assert not list(tmp_path.iterdir())
