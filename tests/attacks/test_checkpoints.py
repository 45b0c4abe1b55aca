"""A checkpoint from somebody else: given to Python, to the command line, from a server."""

import copy
import http.server
import pickle
import threading

import pytest
import torch
import yaml

from lightning_kd import MultiTeacher, PeerCohort
from lightning_kd.cli import main
from lightning_kd.modules import DurableCheckpointIO
from tests.attacks.test_weights import GRAPH, Springs
from tests.test_cli import QUICK, ROOT

TRAP = {"class_path": "trap_module.Trap"}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint as the command line writes it."""
    folder = tmp_path_factory.mktemp("good")
    config = str(ROOT / "configs/digits/multi_teacher.yaml")
    kept = yaml.safe_load((ROOT / "configs/digits/multi_teacher.yaml").read_text())
    for teacher in kept["model"]["init_args"]["teachers"]:
        options = teacher["init_args"]
        options["checkpoint"] = str(ROOT / options["checkpoint"])
    config = folder / "c.yaml"
    config.write_text(yaml.safe_dump(kept))
    main(
        ["fit", "-c", str(config), f"--trainer.default_root_dir={folder}", *QUICK,
         "--trainer.max_epochs=1", "--data.subset=128"],
    )  # fmt: skip
    (path,) = [p for p in folder.rglob("*.ckpt") if p.name != "last.ckpt"]
    return torch.load(path, weights_only=True), config


def evil(options, **more):
    """Options of a checkpoint, changed to harm."""
    return {**copy.deepcopy(options), **more}


def nested(depth):
    spec = {"class_path": "torch.nn.ReLU"}
    for _ in range(depth):
        spec = {"class_path": "lightning_kd.models.Averaged", "init_args": {"networks": [spec]}}
    return spec


OPTIONS = {
    "a_student_that_runs_text": {"student": GRAPH},
    "a_student_of_its_own": {"student": TRAP},
    "a_student_inside_another": {
        "student": {"class_path": "lightning_kd.models.Averaged",
                    "init_args": {"networks": [TRAP]}},
    },
    "a_teacher_of_its_own": {"teachers": [TRAP]},
    "a_loss_of_its_own": {"losses": {"kd": TRAP}},
    "a_metric_of_its_own": {"metrics": {"a": TRAP}},
    "an_optimizer_of_its_own": {"optimizer": {"class_path": "trap_module.spring"}},
    "an_optimizer_that_is_a_shell": {"optimizer": {"class_path": "os.system"}},
    "an_optimizer_by_name": {"optimizer": "trap_module.spring"},
    "a_function_among_arguments": {
        "student": {
            "class_path": "torchvision.models.resnet.ResNet",
            "init_args": {"block": "torchvision.models.resnet.BasicBlock", "layers": [1, 1, 1, 1],
                          "norm_layer": "trap_module.spring"},
        },
    },
    "a_pickle_that_timm_reads": {
        "student": {"class_path": "timm.create_model",
                    "init_args": {"model_name": "resnet10t", "checkpoint_path": "evil.pt"}},
    },
    "a_module_that_a_trusted_one_imported": {
        "student": {"class_path": "lightning_kd.cli.Path", "init_args": {}},
    },
    "the_command_line": {"student": {"class_path": "lightning_kd.cli.main"}},
    "the_package_run": {"student": {"class_path": "lightning_kd.__main__.main"}},
    "another_class": {"_class_path": "trap_module.Trap"},
    "another_instantiator": {"_instantiator": "trap_module.spring"},
    "a_shell_as_instantiator": {"_instantiator": "os.system"},
    "a_huge_number": {
        "student": {"class_path": "lightning_kd.models.resnet8", "init_args": {"width": 10**9}},
    },
    "a_huge_layer": {
        "student": {"class_path": "lightning_kd.models.resnet8",
                    "init_args": {"width": 900_000, "num_classes": 900_000}},
    },
    "far_too_deep": {"student": nested(60)},
    "far_too_many": {"teachers": [{"class_path": "torch.nn.ReLU"}] * 20_000},
    "far_too_long": {"scheduler_interval": "epoch" * 10_000},
    "a_tensor": {"task_weight": torch.zeros(3)},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_checkpoint_name_no_other_code(name, good, tmp_path, trap, refused):
    saved, _ = good
    path = tmp_path / "evil.ckpt"
    options = evil(saved["hyper_parameters"], **OPTIONS[name])
    torch.save({**saved, "hyper_parameters": options}, path)
    refused(lambda: MultiTeacher.load_from_checkpoint(path), "")


@pytest.mark.parametrize(
    "name", [n for n in OPTIONS if "instantiator" not in n and n != "a_huge_layer"]
)
def test_nor_on_the_command_line(name, good, tmp_path, trap, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved, config = good
    path = tmp_path / "evil.ckpt"
    options = evil(saved["hyper_parameters"], **OPTIONS[name])
    torch.save({**saved, "hyper_parameters": options}, path)
    with pytest.raises(ValueError, match=r"Expected"):
        main(["test", "-c", str(config), f"--ckpt_path={path}"])


@pytest.mark.parametrize("kind", ["list", "number", "nothing", "text", "code", "pickle", "empty"])
def test_what_is_no_checkpoint(kind, good, tmp_path, trap, refused):
    saved, _ = good
    path = tmp_path / "evil.ckpt"
    contents = {
        "list": [saved], "number": 3, "nothing": None, "text": "a",
        "code": {**saved, "more": Springs()},
    }  # fmt: skip
    if kind in contents:
        torch.save(contents[kind], path)
    else:
        path.write_bytes(pickle.dumps(Springs()) if kind == "pickle" else b"")
    refused(lambda: MultiTeacher.load_from_checkpoint(path), "checkpoint")


def test_what_a_good_one_names_is_loaded_and_more_by_trust(good, tmp_path, monkeypatch):
    saved, _ = good
    path = tmp_path / "good.ckpt"
    torch.save(saved, path)
    module = MultiTeacher.load_from_checkpoint(path)
    with path.open("rb") as file:
        again = MultiTeacher.load_from_checkpoint(file, weights_only=False)
    assert module.student.state_dict().keys() == again.student.state_dict().keys()
    student = {"class_path": "tests.conftest.TinyNet", "init_args": {"width": 4}}
    own = MultiTeacher.load_from_checkpoint
    torch.save({**saved, "hyper_parameters": {**saved["hyper_parameters"], "student": student},
                "state_dict": {}}, path)  # fmt: skip
    with pytest.raises(ValueError, match=r"trust=\[\.\.\.\]"):
        own(path)
    assert type(own(path, trust=["tests.conftest"], strict=False).student).__name__ == "TinyNet"


@pytest.fixture
def server(tmp_path):
    """Serves a folder; its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(tmp_path), **kwargs)

        def log_message(self, *args):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


def test_a_checkpoint_from_a_server_is_not_unpickled(server, tmp_path, trap, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    torch.save({"state_dict": {}, "more": Springs()}, tmp_path / "evil.ckpt")
    with pytest.raises(Exception, match=r"[Ww]eights.only|needs pickle"):
        DurableCheckpointIO().load_checkpoint(f"{server}/evil.ckpt")
    with pytest.raises(ValueError, match="damaged, or needs pickle"):
        MultiTeacher.load_from_checkpoint(f"{server}/evil.ckpt")


def test_options_from_a_server_are_looked_at_too(server, good, tmp_path, trap):
    saved, _ = good
    options = evil(saved["hyper_parameters"], student=TRAP)
    torch.save({**saved, "hyper_parameters": options}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="Expected a class of"):
        MultiTeacher.load_from_checkpoint(f"{server}/evil.ckpt")
    torch.save(saved, tmp_path / "good.ckpt")
    assert len(MultiTeacher.load_from_checkpoint(f"{server}/good.ckpt").teachers) == 3


def test_a_paradigm_is_not_swapped_for_another(good, tmp_path):
    saved, _ = good
    torch.save(saved, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="blocked"):
        PeerCohort.load_from_checkpoint(tmp_path / "a.ckpt")
