"""``pretrained``: a file of weights, and the JSON beside it that says which network they are of."""

import json
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file

from lightning_kd.models import pretrained, resnet8
from lightning_kd.utils.bounded import physical_memory
from tests.conftest import TinyNet, assert_same_state, state_of

RESNET = {"class_path": "lightning_kd.models.resnet8", "init_args": {"num_classes": 3, "width": 4}}
GRAPH = {
    "class_path": "torch.fx.graph_module.reduce_graph_module",
    "init_args": {
        "body": {"_graphmodule_cls_name": "G"},
        "import_block": "import trap_module\ntrap_module.spring()\ndef forward(self, x): return x",
    },
}


def deep(levels):
    spec = RESNET
    for _ in range(levels):
        spec = {"class_path": "lightning_kd.models.Averaged", "init_args": {"networks": [spec]}}
    return spec


NAMES = {
    "runs_text": GRAPH,
    "runs_text_nested": {
        "class_path": "lightning_kd.models.Averaged", "init_args": {"networks": [RESNET, GRAPH]},
    },
    "runs_text_as_an_argument": {
        "class_path": "lightning_kd.models.Resized", "init_args": {"network": GRAPH, "size": 8},
    },
    "a_function_of_its_own": {"class_path": "trap_module.spring"},
    "a_class_of_its_own": {"class_path": "trap_module.Trap"},
    "a_shell": {"class_path": "os.system", "init_args": {"command": "touch trapped"}},
    "a_process": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "trapped"]}},
    "exec": {"class_path": "builtins.exec", "init_args": {"source": "import trap_module"}},
    "a_hub": {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": ".", "model": "x"}},
    "torch_load": {"class_path": "torch.load", "init_args": {"f": "x.pt"}},
    "a_script": {"class_path": "torch.jit.load", "init_args": {"f": "x.pt"}},
    "what_a_trusted_module_imported": {"class_path": "torchvision.models.resnet.partial"},
    "a_module_of_a_trusted_module": {"class_path": "torch.nn.modules.module.torch.jit.load"},
    "a_method": {"class_path": "lightning_kd.models.CifarResNet.forward"},
    "something_private": {"class_path": "torch.nn.modules.module._addindent"},
    "a_function_of_torch_nn": {"class_path": "torch.nn.utils.parametrize.register_parametrization"},
    "a_helper_of_torchvision": {
        "class_path": "torchvision.models.feature_extraction.create_feature_extractor",
    },
    "a_loader_of_timm": {"class_path": "timm.models.load_checkpoint"},
    "another_file": {
        "class_path": "lightning_kd.models.pretrained", "init_args": {"checkpoint": "w.pt"},
    },
    "a_reader_of_json": {"class_path": "lightning_kd.models.from_json.build_from_json"},
    "a_data_module": {"class_path": "lightning_kd.data.Digits"},
    "a_class_that_is_no_network": {"class_path": "torch.nn.Parameter"},
    "a_bare_name": {"class_path": "GraphModule"},
    "a_dotted_path_with_code": {"class_path": "torch.nn.Linear; import trap_module"},
    "a_number": {"class_path": 7},
    "a_list": {"class_path": ["torch.nn.Linear"]},
    "nothing_of_that_name": {"class_path": "torch.nn.Lineal"},
    "an_empty_name": {"class_path": ""},
}  # fmt: skip
ARGUMENTS = {
    "an_argument_that_is_a_mapping": {"num_classes": {"a": 1}},
    "arguments_by_place": [3, 4],
    "arguments_as_text": "num_classes",
    "an_unknown_argument": {"banana": 1},
    "a_text_for_a_number": {"num_classes": "three"},
    "a_huge_number": {"num_classes": 10**9},
    "a_number_of_400_digits": {"num_classes": 10**400},
    "a_huge_layer": {"num_classes": 1_000_000, "width": 1_000_000},
    "a_large_layer": {"num_classes": 3, "width": 20_000},
    "infinity": {"num_classes": float("inf")},
    "not_a_number": {"num_classes": float("nan")},
    "a_negative_number": {"num_classes": -3},
    "a_long_text": {"num_classes": "3" * 10_000},
    "a_long_list": {"num_classes": [3] * 20_000},
    "too_many_arguments": {f"a{n}": n for n in range(20_000)},
}
TEXTS = {
    "a_list": b"[1, 2]",
    "null": b"null",
    "a_number": b"5",
    "a_text": b'"torch.nn.Linear"',
    "100000_brackets": b"[" * 100_000,
    "100000_braces": b'{"a":' * 100_000,
    "empty": b"",
    "not_utf8": b"\xff\xfe\x00{",
    "zeros": b"\0" * 1000,
    "half": b'{"class_path": "lightning_kd.mo',
    "two_megabytes": b'{"class_path": "' + b"a" * 2**21 + b'"}',
    "a_number_of_100000_digits": b'{"class_path": ' + b"9" * 100_000 + b"}",
}


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Weights of a small network, and a function that writes the JSON beside them."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.safetensors"
    save_file(resnet8(num_classes=3, width=4).state_dict(), path)

    def describe(spec):
        content = spec if isinstance(spec, bytes) else json.dumps(spec).encode()
        path.with_suffix(".json").write_bytes(content)
        return str(path)

    return describe


@pytest.mark.parametrize("name", NAMES)
def test_what_the_json_names_is_not_run(name, weights, trap, refused, tmp_path):
    path = weights(NAMES[name])
    refused(lambda: pretrained(path), r"Expected|class_path")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_are_plain_and_small(name, weights, refused):
    path = weights({"class_path": "lightning_kd.models.resnet8", "init_args": ARGUMENTS[name]})
    refused(lambda: pretrained(path), "does not describe the network of")


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_no_description_is_refused(name, weights, refused):
    path = weights(TEXTS[name])
    refused(lambda: pretrained(path), r"damaged or not JSON|Expected|does not describe")


@pytest.mark.parametrize(
    "spec",
    [
        deep(30),
        {"class_path": "lightning_kd.models.CifarResNet", "init_args": {"depth": 600_002}},
        {"class_path": "lightning_kd.models.MultiBranch",
         "init_args": {"network": RESNET, "layer": "layer3", "branches": 100_000}},
        {"class_path": "torch.nn.Linear",
         "init_args": {"in_features": 50_000, "out_features": 50_000}},
        {"class_path": "torch.nn.Transformer", "init_args": {"num_encoder_layers": 900_000}},
        {"class_path": "torchvision.models.resnet152"},
        {"class_path": "torchvision.models.get_model", "init_args": {"name": "vit_h_14"}},
        {"class_path": "timm.create_model", "init_args": {"model_name": "vit_giant_patch14_224"}},
    ],
)  # fmt: skip
def test_a_network_far_larger_than_the_weights_is_never_built(spec, weights, refused):
    refused(lambda: pretrained(weights(spec)), "does not describe the network of")


@pytest.mark.parametrize(
    "arguments",
    [
        {"model_name": "hf-hub:somebody/something"},
        {"model_name": "local-dir:/tmp/something"},
        {"model_name": "resnet10t", "checkpoint_path": "evil.pt"},
    ],
)
def test_timm_reads_no_other_file(arguments, weights, refused):
    path = weights({"class_path": "timm.create_model", "init_args": arguments})
    refused(lambda: pretrained(path), "without other files")


def test_a_network_of_a_hub_is_built_without_its_weights(tmp_path, monkeypatch):
    """An export of what began from weights that were downloaded."""
    import timm
    from torchvision.models import resnet18

    def no_download(*args, **kwargs):
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_download)
    networks = {
        "torchvision.models.resnet18": (resnet18(num_classes=4), {"weights": "DEFAULT"}),
        "torchvision.models.get_model": (
            resnet18(num_classes=4), {"name": "resnet18", "weights": "IMAGENET1K_V1"},
        ),
        "timm.create_model": (
            timm.create_model("resnet10t", num_classes=4),
            {"model_name": "resnet10t", "pretrained": True},
        ),
        "timm.models.resnet.resnet10t": (
            timm.create_model("resnet10t", num_classes=4), {"pretrained": True},
        ),
    }  # fmt: skip
    for name, (network, options) in networks.items():
        path = tmp_path / "s.safetensors"
        save_file(network.state_dict(), path)
        spec = {"class_path": name, "init_args": {**options, "num_classes": 4}}
        path.with_suffix(".json").write_text(json.dumps(spec))
        assert_same_state(state_of(pretrained(str(path))), state_of(network))


def test_a_package_that_is_trusted_may_be_named(weights):
    path = weights({"class_path": "tests.conftest.TinyNet"})
    save_file(TinyNet().state_dict(), path)
    with pytest.raises(ValueError, match=r"trust=\[\.\.\.\]"):
        pretrained(path)
    assert isinstance(pretrained(path, trust=["tests.conftest"]), TinyNet)
    with pytest.raises(ValueError, match=r"trust=\[\.\.\.\]"):
        pretrained(path, trust=["tests.conf"])  # no package, but the beginning of its name


def test_building_draws_what_building_in_python_draws(weights):
    path = weights(RESNET)
    torch.manual_seed(3)
    pretrained(path)
    after = torch.rand(3)
    torch.manual_seed(3)
    resnet8(num_classes=3, width=4)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize("kind", ["folder", "fifo", "loop", "nowhere"])
@pytest.mark.parametrize("suffix", [".json", ".safetensors", ".pt"])
def test_what_is_no_file_is_not_waited_for(kind, suffix, weights, refused):
    path = os.path.splitext(weights(RESNET))[0]
    place = path + suffix
    if os.path.exists(place):
        os.unlink(place)
    if kind == "folder":
        os.mkdir(place)
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        os.symlink(place if kind == "loop" else path + ".none", place)
    wanted = path + (".safetensors" if suffix == ".json" else suffix)
    refused(lambda: pretrained(wanted), r"^Expected")


def header(entries, body=b""):
    text = json.dumps(entries).encode() if isinstance(entries, dict) else entries
    return struct.pack("<Q", len(text)) + text + body


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
SAFETENSORS = {
    "empty": b"",
    "a_header_of_2_to_the_60": struct.pack("<Q", 2**60) + b"{}",
    "a_header_longer_than_the_file": struct.pack("<Q", 1000) + b"{}",
    "a_header_that_is_a_list": header(b"[1, 2]"),
    "100000_brackets": header(b"[" * 100_000),
    "offsets_outside": header({"a": TENSOR | {"data_offsets": [0, 8000]}}, bytes(8)),
    "offsets_that_overlap": header({"a": TENSOR, "b": TENSOR}, bytes(8)),
    "a_shape_that_is_larger_than_its_bytes": header({"a": TENSOR | {"shape": [10**12]}}, bytes(8)),
    "a_shape_that_overflows": header({"a": TENSOR | {"shape": [2**40, 2**40]}}, bytes(8)),
    "a_negative_shape": header({"a": TENSOR | {"shape": [-2]}}, bytes(8)),
    "an_unknown_dtype": header({"a": TENSOR | {"dtype": "F33"}}, bytes(8)),
    "no_tensors": header({}),
}  # fmt: skip


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_hostile_safetensors_file(name, tmp_path, refused):
    path = tmp_path / "w.safetensors"
    path.write_bytes(SAFETENSORS[name])
    refused(lambda: pretrained(str(path), network=TinyNet()), "not a safetensors file|does not fit")


class Springs:
    def __reduce__(self):
        return (__import__, ("trap_module",))


def torch_files():
    big = torch.zeros(1).expand(10**6, 10**6)
    nested = []
    for _ in range(100):
        nested = [nested]
    good = TinyNet().state_dict()
    return {
        "code": {"state_dict": good, "more": Springs()},
        "a_list": [good],
        "a_number": 5,
        "nothing": None,
        "an_empty_state": {},
        "a_nested_list": nested,
        "keys_that_are_numbers": dict(enumerate(good.values())),
        "values_that_are_numbers": dict.fromkeys(good, 1.0),
        "a_view_of_10_to_the_12": good | {"linear.weight": big},
        "of_complex_numbers": {k: v.to(torch.complex64) for k, v in good.items()},
        "of_whole_numbers": {k: v.long() for k, v in good.items()},
        "not_a_number": good | {"linear.weight": torch.full((10, 64), float("nan"))},
        "infinite": good | {"conv.weight": torch.full((4, 1, 3, 3), float("inf"))},
    }


@pytest.mark.parametrize("name", torch_files())
@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_torch_file(name, legacy, tmp_path, trap, refused):
    path = tmp_path / "w.pt"
    content = torch_files()[name]
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    refused(lambda: pretrained(str(path), network=TinyNet()), r"Expected|does not fit|needs pickle")


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_plain_pickles_do_not_run(protocol, tmp_path, trap, refused):
    path = tmp_path / "w.pth"
    path.write_bytes(pickle.dumps({"state_dict": Springs()}, protocol=protocol))
    refused(lambda: pretrained(str(path), network=TinyNet()), "needs pickle|not a checkpoint")


def test_a_file_larger_than_memory_is_not_read(tmp_path, refused):
    for suffix in ("safetensors", "pt"):
        path = tmp_path / f"w.{suffix}"
        with path.open("wb") as file:
            file.truncate(2 * physical_memory())  # a hole: it takes no room on the disk
        refused(lambda path=path: pretrained(str(path), network=TinyNet()), "fit into .* memory")


def test_whole_numbers_in_safetensors_are_no_weights(tmp_path, refused):
    path = tmp_path / "w.safetensors"
    save_file({k: v.long() for k, v in TinyNet().state_dict().items()}, path)
    refused(lambda: pretrained(str(path), network=TinyNet()), "of another kind of number")
