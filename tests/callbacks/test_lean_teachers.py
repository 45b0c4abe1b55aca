"""Cheaper teachers say the same, and cost what is claimed."""

import copy
import weakref

import pytest
import torch
from lightning.pytorch import Callback
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_kd import MultiTeacher, PeerCohort, SubTeacher, Teacher
from lightning_kd.callbacks import LeanTeachers
from lightning_kd.losses import ConfidentHint, Hint, SoftTarget
from lightning_kd.models import resnet8, resnet20
from lightning_kd.teachers import NoisyTeacher
from lightning_kd.weighting import Switching, Uniform
from tests.conftest import TinyNet, assert_same_state, state_of

IMAGES = torch.rand(8, 1, 8, 8)


class Curious(Uniform):
    wants_images = True


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_answers_are_close_and_float32(dtype):
    network = resnet20(in_channels=1).train()
    with torch.no_grad():
        network(torch.rand(64, 1, 8, 8))  # statistics
    whole, half = Teacher(copy.deepcopy(network)), Teacher(network)
    for teacher in (whole, half):
        teacher.record_layers(["layer2"])
    half.reduce_cost(getattr(torch, dtype))
    expected, said = whole(IMAGES), half(IMAGES)
    assert said.logits.dtype == said.features["layer2"].dtype == torch.float32
    scale = float(expected.logits.abs().max())
    torch.testing.assert_close(said.logits, expected.logits, atol=0.03 * scale, rtol=0)
    assert not torch.equal(said.logits, expected.logits)
    assert network.bn1.running_mean.dtype == torch.float32
    assert network.conv1.weight.dtype == getattr(torch, dtype)


def test_gradient_reaches_the_images_through_half_precision():
    teacher = Teacher(TinyNet())
    images = IMAGES.clone().requires_grad_()
    expected = torch.autograd.grad(teacher(images).logits.square().sum(), images)[0]
    teacher.reduce_cost(torch.bfloat16)
    found = torch.autograd.grad(teacher(images).logits.square().sum(), images)[0]
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.99


class OnDevice(TorchDispatchMode):
    """Most bytes of tensors on a (pretended) GPU at a time."""

    def __init__(self):
        super().__init__()
        self.held, self.now, self.most = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor) and value.device.type == "cuda":
                storage = value.untyped_storage()
                if storage._cdata not in self.held:
                    self.held.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return out

    def freed(self, key, size):
        self.held.discard(key)
        self.now -= size


@pytest.mark.parametrize("offload", [False, True])
def test_offloaded_teachers_visit_one_at_a_time(offload):
    """Tensors without values pretend to lie on a GPU; operations across devices fail on them."""
    with FakeTensorMode(), OnDevice() as memory:
        with torch.device("cuda"):
            student = resnet8(width=4, in_channels=1)
        with torch.device("cpu" if offload else "cuda"):
            teachers = [resnet8(width=64, in_channels=1) for _ in range(5)]
        size = sum(p.nbytes for p in teachers[0].parameters())
        module = MultiTeacher(student, teachers)
        if offload:
            for teacher in module.teachers:
                teacher.reduce_cost(offload=True)
            module.teachers.to("cuda")
        where = {p.device.type for t in teachers for p in t.parameters()}
        assert where == ({"cpu"} if offload else {"cuda"})
        x = torch.empty(2, 1, 8, 8, device="cuda")
        said = module.distillation.teacher_outputs(x, range(5))
        assert {each.logits.device.type for each in said} == {"cuda"}
        assert all(p.device.type == "cpu" for t in teachers for p in t.parameters()) == offload
    assert (1 if offload else 5) * size <= memory.most < (2 if offload else 6) * size


def test_offloading_on_a_cpu_changes_nothing(make_trainer, digits, make_module):
    states = []
    for callbacks in ([], [LeanTeachers(offload=True)]):
        torch.manual_seed(0)
        module = make_module()
        make_trainer(max_epochs=1, callbacks=callbacks).fit(module, datamodule=digits())
        states.append(module.state_dict())
    assert_same_state(*states)


@pytest.mark.parametrize("losses", [[SoftTarget()], [SoftTarget(), Hint("relu", "relu")]])
@pytest.mark.parametrize("weighting", [None, Switching])
def test_batched_teachers_teach_the_same(make_trainer, digits, losses, weighting):
    states = []
    for callbacks in ([], [LeanTeachers(batched=True)]):
        torch.manual_seed(0)
        module = MultiTeacher(
            TinyNet(), [TinyNet(8), TinyNet(8), TinyNet(8)], copy.deepcopy(losses),
            weighting() if weighting else None,
        ).double()  # fmt: skip
        trainer = make_trainer(max_epochs=1, callbacks=callbacks, precision="64-true")
        data = digits()
        data.shuffle_seed = 3
        trainer.fit(module, datamodule=data)
        states.append(module.student.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value)


def test_batched_teachers_of_some_classes_only():
    teachers = [
        Teacher(TinyNet(num_classes=4), classes, num_classes=6)
        for classes in ([0, 1, 2, 3], [2, 3, 4, 5])
    ]
    module = MultiTeacher(TinyNet(num_classes=6), teachers, losses=[])
    module._build(IMAGES)
    expected = [said.logits for said in module.distillation.teacher_outputs(IMAGES, (0, 1))]
    module.teachers.run_batched()
    for teacher in teachers:
        teacher.network.train()
    for said, logits in zip(
        module.distillation.teacher_outputs(IMAGES, (0, 1)), expected, strict=True
    ):
        torch.testing.assert_close(said.logits, logits)


def test_a_cohort_learns_from_light_teachers(make_trainer, digits):
    module = PeerCohort([TinyNet(), TinyNet()], teachers=[TinyNet(8)])
    seen, before = [], state_of(module.teachers[0].network)

    class Look(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            seen.append(module.teachers[0].network.conv.weight.dtype)

    trainer = make_trainer(callbacks=[LeanTeachers(dtype="bfloat16"), Look()])
    trainer.fit(module, datamodule=digits())
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert set(seen) == {torch.bfloat16}
    assert_same_state(state_of(module.teachers[0].network), before)


def test_precisions_that_cast_teachers_are_refused(make_trainer, digits, make_module):
    with pytest.raises(ValueError, match="got 64-true, which casts teachers, too"):
        make_trainer(callbacks=[LeanTeachers(dtype="bfloat16")], precision="64-true").fit(
            make_module(), datamodule=digits()
        )


def test_a_network_that_begins_with_batch_norm():
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(1), TinyNet())
    teacher = Teacher(network)
    teacher.reduce_cost(torch.bfloat16)
    assert teacher(IMAGES).logits.shape == (8, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, 'Expected dtype "bfloat16", "float16" or null'),
        ({"batched": True, "dtype": "bfloat16"}, "Expected batched=True alone"),
    ],
)
def test_wrong_options_are_reported(options, message):
    with pytest.raises(ValueError, match=message):
        LeanTeachers(**options)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: PeerCohort([TinyNet(), TinyNet()]), {"batched": True}, "got PeerCohort"),
        (lambda: SubTeacher(TinyNet(), TinyNet(), NoisyTeacher(2)), {}, "got SubTeacher"),
        (
            lambda: MultiTeacher(TinyNet(), [TinyNet()], weighting=Curious()),
            {"offload": True},
            "Curious, which reaches",
        ),
        (
            lambda: MultiTeacher(
                TinyNet(), [TinyNet()], [ConfidentHint("relu", "relu", teacher_classifier="linear")]
            ),
            {"dtype": "bfloat16"},
            "ConfidentHint, which reaches",
        ),
        (lambda: MultiTeacher(TinyNet(), [TinyNet()]), {"batched": True}, "two or more teachers"),
        (
            lambda: MultiTeacher(TinyNet(), [TinyNet(8), TinyNet(6)]),
            {"batched": True},
            "teacher 1 differs from teacher 0",
        ),
    ],
)
def test_what_does_not_go_together_is_reported(make_trainer, digits, make, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(callbacks=[LeanTeachers(**options)]).fit(make(), datamodule=digits())
