import hashlib
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from lightning_kd.models import Normalized, pretrained, resnet8
from tests.conftest import TinyNet, assert_same_state, state_of


@pytest.fixture
def network():
    return TinyNet()


def fresh():
    torch.manual_seed(99)
    return TinyNet()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"model.backbone.{k}": v for k, v in s.items()}},
        lambda s: {
            "state_dict": {f"student.{k}": v for k, v in s.items()}
            | {"losses.hint.w": torch.ones(1)}
        },
        lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
    ],
)
def test_reads_state_dicts_of_many_shapes(wrap, network, tmp_path):
    torch.save(wrap(network.state_dict()), tmp_path / "w.pt")
    loaded = pretrained(str(tmp_path / "w.pt"), network=fresh())
    assert_same_state(state_of(loaded), state_of(network))
    assert not loaded.training


def test_reads_safetensors_with_metadata_normalisation_and_hash(network, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(network.state_dict(), path, {"mean": "[0.25]", "std": "0.5"})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    loaded = pretrained(str(path), network=fresh(), sha256=digest)
    assert isinstance(loaded, Normalized)
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(loaded(x), network.eval()((x - 0.25) / 0.5))
    other = pretrained(str(path), network=fresh(), mean=[0.0], std=[1.0])
    torch.testing.assert_close(other(x), network(x))
    with pytest.raises(ValueError, match="Expected sha256 00"):
        pretrained(str(path), network=fresh(), sha256="00")


def test_missing_file_lists_its_neighbours(tmp_path):
    (tmp_path / "resnet.pt").touch()
    with pytest.raises(FileNotFoundError, match=r"resnet\.pt"):
        pretrained(str(tmp_path / "resnet.pth"), network=fresh())


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("keep", [0, 7, 200, 0.9])
def test_truncated_file_is_reported(suffix, keep, network, tmp_path):
    path = tmp_path / f"w.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(network.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(ValueError, match=r"truncated|not a checkpoint"):
        pretrained(str(path), network=fresh())


class Payload:
    ran = False

    def __reduce__(self):
        return (setattr, (Payload, "ran", True))


def test_pickled_code_is_refused_and_does_not_run(network, tmp_path):
    torch.save({"state_dict": network.state_dict(), "evil": Payload()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="needs pickle"):
        pretrained(str(tmp_path / "w.pt"), network=fresh())
    torch.save(network, tmp_path / "whole.pt")
    with pytest.raises(ValueError, match="needs pickle"):
        pretrained(str(tmp_path / "whole.pt"), network=fresh())
    assert not Payload.ran


def test_other_keys_and_shapes_are_listed(network, tmp_path):
    path = str(tmp_path / "w.pt")
    torch.save(network.state_dict(), path)
    with pytest.raises(
        ValueError, match=r"of another shape: linear\.weight \(file \(10, 64\), network \(5, 64\)\)"
    ):
        pretrained(path, network=TinyNet(num_classes=5))
    with pytest.raises(ValueError, match=r"missing in the file: conv1\.weight"):
        pretrained(path, network=resnet8())
    torch.save(network.state_dict() | {"extra": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="unknown to the network: extra"):
        pretrained(path, network=fresh())
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="hold a state dict, got list"):
        pretrained(path, network=fresh())


def test_torchvision_weights_file(tmp_path):
    from torchvision.models import resnet18

    source = resnet18(num_classes=4)
    torch.save(source.state_dict(), tmp_path / "r.pth")
    assert_same_state(
        state_of(pretrained(str(tmp_path / "r.pth"), network=resnet18(num_classes=4))),
        state_of(source),
    )


def test_network_is_built_from_the_json_beside_the_file(tmp_path):
    source = resnet8(num_classes=3, in_channels=1, width=4)
    save_file(source.state_dict(), tmp_path / "s.safetensors")
    spec = {
        "class_path": "lightning_kd.models.resnet8",
        "init_args": {"num_classes": 3, "in_channels": 1, "width": 4},
    }
    with pytest.raises(FileNotFoundError, match="give `network`"):
        pretrained(str(tmp_path / "s.safetensors"))
    (tmp_path / "s.json").write_text(json.dumps(spec))
    assert_same_state(state_of(pretrained(str(tmp_path / "s.safetensors"))), state_of(source))
    for bad in (
        {"class_path": "os.system", "init_args": {"command": "true"}},
        {"class_path": None},
    ):
        (tmp_path / "s.json").write_text(json.dumps(bad))
        with pytest.raises(ValueError, match="does not"):
            pretrained(str(tmp_path / "s.safetensors"))


def test_models_import_without_lightning_or_plots():
    code = (
        "import sys, lightning_kd.models;"
        "print([m for m in ('lightning', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )
