import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from lightning_kd import MultiTeacher, Supervised
from lightning_kd.cli import main
from lightning_kd.data import Digits
from tests.conftest import assert_same_state

ROOT = Path(__file__).parents[1]
QUICK = [
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_model_summary=false",
]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def fit(tmp_path):
    def go(*args, config="configs/digits/multi_teacher.yaml", folder=tmp_path / "run"):
        return main(
            [
                "fit",
                "-c",
                config,
                f"--trainer.default_root_dir={folder}",
                "--trainer.max_epochs=1",
                "--data.subset=128",
                *QUICK,
                *args,
            ]
        )

    return go


def message(capsys, *args):
    """What the command line says when it refuses."""
    with pytest.raises(SystemExit):
        main(list(args))
    return capsys.readouterr().err


def test_fit_test_validate_and_predict(fit, tmp_path):
    cli = fit()
    folder = tmp_path / "run"
    assert {"config.yaml", "report.json", "report.png", "student.safetensors", "student.json"} <= {
        p.name for p in folder.iterdir()
    }
    (checkpoint,) = [p for p in folder.rglob("*.ckpt") if p.name != "last.ckpt"]
    for command in ("validate", "test", "predict"):
        again = main([command, "-c", str(folder / "config.yaml"), f"--ckpt_path={checkpoint}"])
        assert_same_state(again.model.student.state_dict(), cli.model.student.state_dict())


def test_the_datas_classes_and_channels_are_filled_in(fit):
    cli = fit("--model.student=lightning_kd.models.resnet14", "--model.student.width=4")
    assert cli.model.student.linear.out_features == 10
    assert cli.model.student.conv1.in_channels == 1
    assert cli.model.num_classes == 10


def test_a_nested_network_is_filled_in_too(fit):
    cli = fit(
        "--trainer.fast_dev_run=true",
        '--model.student={"class_path": "lightning_kd.models.Normalized", "init_args": {'
        '"mean": [0.5], "std": [0.5], "network": {"class_path": "lightning_kd.models.resnet8"}}}',
    )
    assert cli.model.student.network.linear.out_features == 10


def test_any_torchvision_factory_is_student_and_teacher(tmp_path):
    network = {"class_path": "torchvision.models.resnet18", "init_args": {"num_classes": 10}}
    config = {
        "model": {
            "class_path": "lightning_kd.MultiTeacher",
            "init_args": {"student": network, "teachers": [network]},
        },
        "data": {"class_path": "tests.test_cli.Colour"},
        "trainer": {"fast_dev_run": True, "logger": False, "enable_progress_bar": False},
    }
    cli = main({"subcommand": "fit", "fit": config})
    assert type(cli.model.teachers[0].network).__name__ == "ResNet"


class Colour(Digits):
    image_shape = (3, 32, 32)

    def load(self, train):
        return torch.randint(0, 256, (300, 3, 32, 32), dtype=torch.uint8), torch.arange(300) % 10


def test_saved_config_runs_again_to_the_same_weights(fit, tmp_path):
    first = fit()
    second = main(
        [
            "fit",
            "-c",
            str(tmp_path / "run" / "config.yaml"),
            f"--trainer.default_root_dir={tmp_path / 'again'}",
        ]
    )
    assert_same_state(first.model.state_dict(), second.model.state_dict())
    a, b = [yaml.safe_load((tmp_path / n / "config.yaml").read_text()) for n in ("run", "again")]
    a["trainer"].pop("default_root_dir"), b["trainer"].pop("default_root_dir")
    assert a == b


def test_load_from_checkpoint_without_arguments(fit, tmp_path):
    cli = fit(
        "--model.losses+=lightning_kd.losses.Hint",
        "--model.losses.student_layer=layer3",
        "--model.losses.teacher_layer=[layer3,layer3,block3]",
    )
    (path,) = [p for p in (tmp_path / "run").rglob("*.ckpt") if p.name != "last.ckpt"]
    for kind in (MultiTeacher,):
        module = kind.load_from_checkpoint(path, weights_only=True)
        assert_same_state(module.state_dict(), cli.model.state_dict())
        assert len(module.teachers) == 3
    content = torch.load(path, weights_only=True)
    assert not [k for k in content["state_dict"] if "teacher" in k]
    assert content["hyper_parameters"]["task_weight"] == 0.1


def test_resume_over_the_command_line_equals_the_uninterrupted_run(fit, tmp_path):
    whole = fit("--trainer.max_epochs=3", folder=tmp_path / "whole")
    fit("--trainer.max_epochs=2", folder=tmp_path / "part")
    last = next((tmp_path / "part").rglob("last.ckpt"))
    resumed = fit("--trainer.max_epochs=3", f"--ckpt_path={last}", folder=tmp_path / "part")
    assert_same_state(whole.model.state_dict(), resumed.model.state_dict())


def test_saved_options_that_beat_the_command_line_are_reported(fit, tmp_path):
    fit()
    last = next((tmp_path / "run").rglob("last.ckpt"))
    with pytest.warns(UserWarning, match=r"\.task_weight = 0\.1 \(requested: 0\.7\)"):
        cli = fit("--model.task_weight=0.7", f"--ckpt_path={last}")
    assert cli.model.distillation.task_weight == 0.1


def test_optimizer_option_never_reaches_teachers(fit):
    cli = fit("--model.optimizer=torch.optim.Adam", "--model.optimizer.lr=0.001")
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is torch.optim.Adam
    held = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    assert held == sum(p.numel() for p in cli.model.student.parameters())
    assert optimizer.param_groups[0]["weight_decay"] == 0, "SGD's options leaked into Adam"


def test_a_second_run_into_the_same_folder_is_refused_and_overwrite_allows_it(fit, tmp_path):
    fit()
    before = (tmp_path / "run" / "report.json").read_bytes()
    with pytest.raises(
        FileExistsError, match=r"earlier run: .*--trainer\.default_root_dir.*--overwrite"
    ):
        fit()
    assert (tmp_path / "run" / "report.json").read_bytes() == before
    fit("--overwrite=true")
    assert (tmp_path / "run" / "report.json").read_bytes() != before


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--model.temprature=3"], "temprature"),
        (["--model.losses.soft_target.temprature=3"], "temprature"),
        (["--data.batchsize=3"], "batchsize"),
        (["--model.losses.soft_target.temperature=-1"], "Expected temperature > 0"),
        (["--model.weighting=lightning_kd.losses.SoftTarget"], "lightning_kd.losses.SoftTarget"),
        (["--model.student=lightning_kd.models.resnet9"], "resnet9"),
        (["--data.batch_size=many"], "many"),
        (["--model.losses.soft_target.temperature=[1,2]"], "temperature"),
    ],
)
def test_bad_options_name_the_key(args, expected, capsys):
    with pytest.raises((SystemExit, ValueError)) as caught:
        main(["fit", "-c", "configs/digits/multi_teacher.yaml", *QUICK, *args])
    assert expected in capsys.readouterr().err + str(caught.value)


def test_a_loss_is_reached_by_its_name(fit, tmp_path):
    config = yaml.safe_load((ROOT / "configs/digits/multi_teacher.yaml").read_text())
    losses = config["model"]["init_args"]["losses"]
    losses["kd"] = losses.pop("soft_target")
    losses["maps"] = {
        "class_path": "lightning_kd.losses.AttentionTransfer",
        "init_args": {"student_layer": "layer3", "teacher_layer": ["layer3", "layer3", "block3"]},
    }
    schedule = {"class_path": "lightning_kd.schedules.Linear",
                "init_args": {"start": 1, "end": 0, "duration": 9}}  # fmt: skip
    config["trainer"]["callbacks"].append(
        {"class_path": "lightning_kd.callbacks.LossWeightScheduler",
         "init_args": {"schedule": schedule, "loss": "maps"}}
    )  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    cli = fit(
        "--model.losses.kd.temperature", "6", "--model.losses.kd.init_args.weight=0.5",
        config=str(tmp_path / "c.yaml"),
    )  # fmt: skip
    kd = cli.model.distillation.losses["kd"]
    assert (kd.temperature, kd.weight) == (6, 0.5)
    assert list(cli.model.distillation.losses) == ["kd", "maps"]
    assert cli.model.distillation.losses["maps"].weight == 1
    logged = cli.trainer.callback_metrics
    assert {"train/kd", "train/maps", "schedule/losses.maps.weight"} <= set(logged)
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["model"]["init_args"]["losses"]["kd"]["init_args"]["temperature"] == 6


def test_options_do_not_leak_into_another_class_of_a_named_loss(fit):
    cli = fit("--model.losses.soft_target", "lightning_kd.losses.LogitMSE")
    assert type(cli.model.distillation.losses["soft_target"]).__name__ == "LogitMSE"
    assert cli.model.distillation.losses["soft_target"].weight == 1.0  # not SoftTarget's 0.9


def test_one_callback_needs_no_list(fit, tmp_path):
    config = yaml.safe_load((ROOT / "configs/digits/multi_teacher.yaml").read_text())
    config["trainer"]["callbacks"] = {"class_path": "lightning_kd.callbacks.ChannelsLast"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    cli = fit(config=str(tmp_path / "c.yaml"))
    assert "ChannelsLast" in {type(c).__name__ for c in cli.trainer.callbacks}


def test_an_index_of_a_list_is_refused_in_a_sentence(capsys):
    config = "configs/digits/multi_teacher.yaml"
    said = message(capsys, "fit", "-c", config, "--model.losses.0.weight=1")
    assert "Expected options by name, got the index of a list" in said


def test_unknown_key_in_a_file_is_reported(tmp_path, capsys):
    config = yaml.safe_load((ROOT / "configs/digits/multi_teacher.yaml").read_text())
    config["model"]["init_args"]["teacher"] = config["model"]["init_args"].pop("teachers")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert "teacher" in message(capsys, "fit", "-c", str(tmp_path / "c.yaml"))


def test_no_teachers_is_reported(fit):
    with pytest.raises(ValueError, match="Expected at least one teacher, got none"):
        fit("--model.teachers=[]")


def test_options_do_not_leak_when_a_class_is_replaced(fit):
    cli = fit(
        '--model.losses=[{"class_path": "lightning_kd.losses.LogitMSE"}]',
        "--model.weighting=lightning_kd.weighting.Fixed",
        "--model.weighting.weights=[1,1,0]",
    )
    loss = cli.model.distillation.losses["logit_mse"]
    assert loss.weight == 1.0
    assert cli.model.distillation.weighting.space == "probability"


def test_live_objects_through_main(tmp_path, tiny):
    cli = main(
        {
            "subcommand": "fit",
            "fit": {
                "model": {
                    "class_path": "lightning_kd.Supervised",
                    "init_args": {
                        "student": {
                            "class_path": "lightning_kd.models.resnet8",
                            "init_args": {"width": 4},
                        }
                    },
                },
                "data": {"class_path": "lightning_kd.data.Digits"},
                "trainer": {"fast_dev_run": True, "logger": False, "enable_progress_bar": False},
            },
        }
    )
    assert isinstance(cli.model, Supervised)


def test_console_script_helps_and_returns_zero():
    code = (
        "import sys; from lightning_kd.cli import run;"
        "sys.argv = ['lightning-kd', 'fit', '--model.help', 'lightning_kd.MultiTeacher']; run()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    assert "One or more trained networks of the same classes; they are never touched." in text
    assert "task_weight" in text
    assert len(done.stdout.splitlines()) < 150, "every nn.Module there is was listed"
    module = subprocess.run(
        [sys.executable, "-m", "lightning_kd", "--help"], capture_output=True, text=True
    )
    assert module.returncode == 0
    assert "lightning-kd" in module.stdout


def test_help_says_null_as_yaml_does_where_docstrings_say_none(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--data.help", "lightning_kd.data.Digits"])
    text = " ".join(capsys.readouterr().out.split())
    assert "a fraction up to 1, or a count; null: all." in text
    assert "``None``" not in text


def test_run_returns_nothing_so_that_the_shell_sees_success(monkeypatch):
    from lightning_kd import cli

    monkeypatch.setattr(cli, "main", lambda: object())
    assert cli.run() is None


def test_no_own_warning_in_a_plain_run(fit):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit()
    assert not [w for w in caught if "lightning_kd" in w.filename]


def test_a_mistake_ends_in_one_sentence_and_a_fault_in_its_traceback(monkeypatch, tmp_path):
    from lightning_kd import cli

    config = "configs/digits/multi_teacher.yaml"
    args = ["lightning-kd", "fit", "-c", config, "--data.batch_size=0"]
    monkeypatch.setattr("sys.argv", [*args, f"--trainer.default_root_dir={tmp_path}", *QUICK])
    with pytest.raises(SystemExit, match=r"^lightning-kd: Expected batch_size >= 1, got 0\.$"):
        cli.run()

    (tmp_path / "report.json").touch()
    args = ["lightning-kd", "fit", "-c", config, f"--trainer.default_root_dir={tmp_path}", *QUICK]
    monkeypatch.setattr("sys.argv", args)
    with pytest.raises(SystemExit, match=r"^lightning-kd: .*report\.json holds the results"):
        cli.run()

    def fault():
        raise ValueError("elsewhere")

    monkeypatch.setattr(cli, "main", fault)
    with pytest.raises(ValueError, match="elsewhere"):
        cli.run()


def test_a_resumed_run_remembers_which_epoch_was_best(tmp_path):
    """With a logger, whose folder is a new one in the second run."""
    folder = tmp_path / "run"
    args = [
        "fit", "-c", "configs/digits/cohort.yaml", f"--trainer.default_root_dir={folder}",
        "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--data.subset=256",
    ]  # fmt: skip
    main([*args, "--trainer.max_epochs=4"])
    (best,) = (folder / "checkpoints").glob("best*.ckpt")
    last = folder / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    for callback in saved["callbacks"].values():
        if callback.get("monitor"):
            callback["best_model_score"] = torch.tensor(2.0)  # better than anything can be
            callback["best_k_models"] = {str(best): torch.tensor(2.0)}
            callback["kth_value"] = torch.tensor(2.0)
    torch.save(saved, last)
    cli = main([*args, "--trainer.max_epochs=5", f"--ckpt_path={last}"])
    keeper = cli.trainer.checkpoint_callback
    assert Path(keeper.best_model_path) == best
    assert float(keeper.best_model_score) == 2.0
    assert len(list((folder / "lightning_logs").iterdir())) == 2


@pytest.mark.parametrize("command", ["test", "validate"])
def test_measuring_what_no_run_has_trained_is_said(command, fit, tmp_path, recwarn):
    fit()
    config = str(tmp_path / "run" / "config.yaml")
    with pytest.warns(UserWarning, match=f"{command} without --ckpt_path"):
        main([command, "-c", config])
    recwarn.clear()
    main([command, "-c", config, f"--ckpt_path={next((tmp_path / 'run').rglob('last.ckpt'))}"])
    assert not [w for w in recwarn if "without --ckpt_path" in str(w.message)]
