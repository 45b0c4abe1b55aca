"""The core without Lightning: a plain loop, losses on tensors, and what it refuses."""

import argparse
import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import nn

from lightning_kd import (
    Cohort,
    Distillation,
    MultiTeacher,
    NetworkOutput,
    PeerCohort,
    Teacher,
    losses,
)  # fmt: skip
from lightning_kd.exchange import Fusion
from lightning_kd.losses import (
    AttentionTransfer,
    DecoupledKL,
    Hint,
    KnowledgeFlow,
    LogitMSE,
    Relational,
    SoftTarget,
)  # fmt: skip
from lightning_kd.weighting import Confidence, Fixed, LearnedGate
from tests import reference
from tests.conftest import TinyNet, assert_same_state, state_of

X, Y = torch.rand(8, 1, 8, 8), torch.arange(8) % 10


# ---------------------------------------------------------------------- a plain loop


def test_a_plain_loop_trains_the_student_and_leaves_teachers_alone():
    """The loop that README shows."""
    student, teachers = TinyNet(), [TinyNet(8), TinyNet(6)]
    before = [state_of(teacher) for teacher in teachers]
    distillation = Distillation(
        student, teachers, losses={"kd": SoftTarget(4.0, weight=0.9), "hint": Hint("relu", "relu")}
    )
    distillation.build(X)
    optimizer = torch.optim.SGD(distillation.parameters(), lr=0.1)
    found = []
    for _ in range(20):
        result = distillation(X, Y)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        found.append(float(result["loss"].detach()))
    assert list(result) == ["loss", "task", "kd", "hint", "output"]
    total = result["task"] + result["kd"] + result["hint"]
    torch.testing.assert_close(result["loss"], total)
    assert result["output"].shape == (8, 10)
    assert found[-1] < 0.8 * found[0]
    for teacher, state in zip(teachers, before, strict=True):
        assert_same_state(state_of(teacher), state)
        assert all(p.grad is None for p in teacher.parameters())
    assert not [name for name in distillation.state_dict() if "teachers" in name]


def test_the_plain_loop_and_the_lightning_module_compute_the_same(make_trainer):
    torch.manual_seed(1)
    student, teacher = TinyNet(dropout=0.0), TinyNet(8)
    core = Distillation(copy.deepcopy(student), copy.deepcopy(teacher))
    result = core(X, Y)
    module = MultiTeacher(student, [teacher])
    module._build(X)
    named = module.compute_losses(X, Y)
    for name, value in named.items():
        assert torch.equal(value, result[name]), name
    expected = 0.9 * 16 * reference_kl(result["output"], teacher.eval()(X), 4.0)
    torch.testing.assert_close(result["soft_target"], expected)
    torch.testing.assert_close(result["task"], 0.1 * F.cross_entropy(result["output"], Y))


def reference_kl(student, teacher, temperature):
    return reference.kl_divergence(student, teacher, temperature, temperature).mean()


def test_a_core_that_was_built_by_hand_is_trained_by_a_trainer(make_trainer, digits):
    module = MultiTeacher(TinyNet(), [TinyNet(8)], [SoftTarget(), Hint("relu", "relu")])
    module.distillation.build(X)
    adapter = module.distillation.losses["hint"].projections[0]
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=digits())
    assert module.distillation.losses["hint"].projections[0] is adapter
    assert "val/accuracy" in trainer.callback_metrics


def test_one_teacher_needs_no_list_and_a_student_alone_no_losses():
    alone = Distillation(TinyNet(), task_weight=1.0)(X, Y)
    assert list(alone) == ["loss", "task", "output"]
    with_teacher = Distillation(TinyNet(), TinyNet(8))(X, None)
    assert list(with_teacher) == ["loss", "soft_target", "output"]


def test_adapters_made_too_late_are_reported():
    distillation = Distillation(TinyNet(), TinyNet(8), [Hint("relu", "relu")])
    with pytest.warns(UserWarning, match=r"call build\(images\) before the optimizer is made"):
        distillation(X, Y)


def test_a_cohort_in_a_plain_loop_equals_the_lightning_module():
    torch.manual_seed(0)
    peers = [TinyNet(4), TinyNet(6)]
    cohort = Cohort(copy.deepcopy(peers), teachers=[TinyNet(8)])
    result = cohort(X, Y)
    assert result["output"].shape == (2, 8, 10)
    module = PeerCohort(peers, teachers=list(cohort.teachers.networks()))
    module._build(X)
    named = module.compute_losses(X, Y)
    assert set(named) == set(result) - {"loss", "output"}
    for name, value in named.items():
        assert torch.equal(value, result[name]), name
    optimizer = torch.optim.SGD(cohort.parameters(), lr=0.1)
    first = float(result["loss"].detach())
    for _ in range(15):
        loss = cohort(X, Y)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < first


def test_a_forward_pass_without_anything_to_learn_is_refused():
    with pytest.raises(ValueError, match="Expected at least one loss, got none"):
        Distillation(TinyNet(), TinyNet(8), losses=[])(X, None)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"losses": SoftTarget()}, TypeError, "Expected a list of losses, or a mapping"),
        ({"losses": [3]}, TypeError, "Expected losses of type DistillationLoss, got int"),
        ({"losses": {"task": SoftTarget()}}, ValueError, "taken in the log, got 'task'"),
        ({"losses": {"a.b": SoftTarget()}}, ValueError, "made of letters, digits and _"),
        ({"losses": {"items": SoftTarget()}}, ValueError, "no method of a mapping"),
        ({"teachers": 3}, TypeError, "Expected a list of teachers, got int"),
        ({"teachers": [3]}, TypeError, "Expected teachers of type Module, got int"),
        ({"weighting": 3}, TypeError, "Expected weighting of type Weighting, got int"),
        ({"task": 3}, TypeError, "Expected task of type Task, got int"),
        ({"student": 3}, TypeError, "Expected student of type Module, got int"),
    ],
)
def test_wrong_parts_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Distillation(**{"student": TinyNet(), "teachers": [TinyNet(8)], **options})


# ---------------------------------------------------------------------- losses on tensors


def test_logit_losses_take_tensors():
    student = torch.randn(4, 5, requires_grad=True)
    teacher, target = torch.randn(4, 5), torch.tensor([0, 4, -1, 2])
    loss = SoftTarget(4.0)(student, teacher)
    torch.testing.assert_close(loss, 16 * reference_kl(student, teacher, 4.0))
    loss.backward()
    assert student.grad.abs().sum() > 0
    rows = LogitMSE()(student.detach(), teacher)
    torch.testing.assert_close(rows, F.mse_loss(student.detach(), teacher))
    two = [teacher, torch.randn(4, 5)]
    value = DecoupledKL()(student, two, target)
    assert value.dim() == 0
    once = DecoupledKL()(NetworkOutput(student), [NetworkOutput(t) for t in two], target)
    torch.testing.assert_close(value, once)
    # several teachers count the same: for a divergence that is the mean of the divergences
    halves = [SoftTarget(1.0)(student, t) for t in two]
    both = torch.autograd.grad(SoftTarget(1.0)(student, two), student)[0]
    torch.testing.assert_close(both, torch.autograd.grad(sum(halves) / 2, student)[0])


def test_what_teachers_say_is_detached_for_tensors_too():
    teacher = torch.randn(4, 5, requires_grad=True)
    SoftTarget()(torch.randn(4, 5, requires_grad=True), teacher).backward()
    assert teacher.grad is None


def test_layer_losses_take_features_and_size_themselves_at_first_use():
    student, teacher = torch.randn(4, 3, 6, 6, requires_grad=True), torch.randn(4, 8, 3, 3)
    hint = Hint("any", "any")
    assert not list(hint.parameters())
    first = hint(student, teacher)
    first.backward()
    assert all(p.grad is not None for p in hint.parameters())
    assert torch.equal(hint(student, teacher), first)  # the same adapter
    by_hand = (hint.projections[0](student) - teacher).square().mean()
    torch.testing.assert_close(first, by_hand)
    two = Hint("any", "any")(student, [teacher, torch.randn(4, 5, 6, 6)])
    assert two.isfinite()
    maps = AttentionTransfer("a", ["b", "c"])(student, [teacher, teacher])
    torch.testing.assert_close(maps, AttentionTransfer("a", "b")(student, teacher))
    assert Relational("a", "a")(torch.randn(4, 7), torch.randn(4, 3)).isfinite()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (KnowledgeFlow("a", "a"), "KnowledgeFlow, which reads more than one tensor"),
        (losses.GraphDistillation("a", "a"), "GraphDistillation, which reads more than one tensor"),
        (losses.HeadTarget(2), "HeadTarget, which reads more than one tensor"),
    ],
)
def test_losses_that_need_more_than_a_tensor_say_so(loss, message):
    with pytest.raises(TypeError, match=message):
        loss(torch.randn(4, 3), torch.randn(4, 3))


@pytest.mark.parametrize("teachers", [[], "abc", 3.0, [None]])
def test_teachers_of_other_types_are_refused(teachers):
    with pytest.raises(TypeError, match="teachers as tensors or NetworkOutput"):
        SoftTarget()(torch.randn(4, 3), teachers)


# ---------------------------------------------------------------------- weight averaging


@pytest.mark.parametrize("kind", ["hint", "gate", "fusion"])
def test_weight_averaging_copies_what_a_dry_run_sizes(kind, make_trainer, digits, tmp_path):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    class Watched(EMAWeightAveraging):
        def on_train_end(self, trainer, module):
            self.live = state_of(module)
            super().on_train_end(trainer, module)

    torch.manual_seed(0)
    module = {
        "hint": lambda: MultiTeacher(TinyNet(), [TinyNet(8)], [SoftTarget(), Hint("relu", "relu")]),
        "gate": lambda: MultiTeacher(TinyNet(), [TinyNet(8), TinyNet(6)], weighting=LearnedGate()),
        "fusion": lambda: PeerCohort([TinyNet(), TinyNet(6)], Fusion("relu")),
    }[kind]()
    averaging = Watched(decay=0.5)
    trainer = make_trainer(max_epochs=2, callbacks=[averaging])
    trainer.fit(module, datamodule=digits())
    part = {"hint": "projections", "gate": "gate.weight", "fusion": "exchange"}[kind]
    names = [n for n, p in module.named_parameters() if part in n and p.requires_grad]
    assert names
    assert any(not torch.equal(averaging.live[n], module.state_dict()[n]) for n in names)
    assert trainer.callback_metrics["train/loss"].isfinite()
    path = tmp_path / "averaged.ckpt"
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["state_dict"].keys() == module.state_dict().keys()


def test_weightings_see_students_first():
    """One order of arguments everywhere: student, teachers, target."""
    student, teachers = NetworkOutput(torch.randn(3, 4)), [NetworkOutput(torch.randn(3, 4))] * 2
    assert Confidence()(student, teachers, torch.tensor([0, 1, 2])).shape == (2, 3)
    assert isinstance(Distillation(TinyNet(), [TinyNet(8)]).losses, nn.ModuleDict)


# ---------------------------------------------------------------------- faults that a review found


@pytest.mark.parametrize("loss", [Relational("a", "a"), losses.PKT("a", "a")])
def test_losses_of_a_whole_batch_are_float32_under_autocast(loss):
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    plain = loss(student, [teacher, teacher + 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = loss(student, [teacher, teacher + 1])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_adapters_have_the_dtype_of_what_they_are_first_given(dtype):
    student, teacher = torch.randn(4, 3, dtype=dtype), torch.randn(4, 5, dtype=dtype)
    for loss in (Hint("a", "a"), losses.FEED("a", "a"), losses.MEAL("a", "a")):
        assert loss(student, teacher).isfinite()
        assert {p.dtype for p in loss.parameters()} == {dtype}
    core = Distillation(TinyNet(), TinyNet(8), [Hint("relu", "relu")]).double()
    core.build(X.double())
    assert core(X.double(), Y)["hint"].dtype == torch.float64


def test_a_loss_that_a_core_has_sized_is_not_sized_again():
    class Counted(SoftTarget):
        built = 0

        def build(self, student, teachers):
            self.built += 1

    core = Distillation(TinyNet(), TinyNet(8), {"kd": Counted()})
    core.build(X)
    core.losses["kd"](torch.randn(2, 3), torch.randn(2, 3))
    assert core.losses["kd"].built == 1
    hint = Hint("a", "a").eval()
    with torch.inference_mode():
        hint(torch.randn(4, 3), torch.randn(4, 5))
    assert not any(part.training for part in hint.modules())
    hint(torch.randn(4, 3), torch.randn(4, 5)).backward()


def test_losses_without_teachers_and_names_of_modules_are_refused():
    with pytest.raises(ValueError, match="Expected teachers with losses, got none"):
        Distillation(TinyNet(), losses=[SoftTarget()])
    with pytest.raises(ValueError, match="got 'training' for SoftTarget"):
        Distillation(TinyNet(), TinyNet(8), {"training": SoftTarget()})


def ways(network):
    modes = [part.training for part in network.modules()]
    return modes, [p.requires_grad for p in network.parameters()]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_breaks_off_gives_teachers_back(error, make_trainer, digits):
    class Break(Callback):
        def on_train_batch_end(self, *args):
            raise error

    network = TinyNet(8)
    before = ways(network)
    module = MultiTeacher(TinyNet(), [network])
    with pytest.raises((error, SystemExit)):
        make_trainer(callbacks=[Break()]).fit(module, datamodule=digits())
    assert ways(network) == before


def test_one_trainer_fits_and_tests_without_a_word_about_callbacks(make_trainer, digits, caplog):
    module, trainer = MultiTeacher(TinyNet(), [TinyNet(8)]), make_trainer(max_epochs=1)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        trainer.fit(module, datamodule=digits())
        trainer.test(module, datamodule=digits(), verbose=False)
    assert "override" not in caplog.text


def test_one_network_in_several_teachers_is_given_back(make_trainer, digits):
    network = TinyNet(8)
    before = ways(network)
    other = MultiTeacher(TinyNet(), [network])
    module = MultiTeacher(TinyNet(), [network, nn.Sequential(nn.Identity(), network)])
    network.dropout = nn.Dropout2d(0.5)  # a part that came later
    make_trainer(max_epochs=1).fit(module, datamodule=digits())
    assert ways(network) == before
    assert other.teachers[0].network is network


def test_a_copy_of_a_teacher_has_its_own_classes():
    teacher = Teacher(TinyNet(num_classes=4), [0, 1, 2, 3], 10)
    copy.deepcopy(teacher).to("meta")
    assert teacher.classes.device.type == "cpu"
    assert teacher(X).logits.shape == (8, 10)


def test_own_hyperparameters_do_not_keep_a_checkpoint_from_loading(make_trainer, digits, tmp_path):
    module = MultiTeacher(TinyNet(), [TinyNet(8)], task_weight=0.3)
    module.save_hyperparameters({"dataset": "digits"})
    module.save_hyperparameters(argparse.Namespace(run="a"))
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=digits())
    assert module.hparams["dataset"] == "digits"
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    given = {"student": TinyNet(), "teachers": [TinyNet(8)]}
    again = MultiTeacher.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True, **given)
    assert again.distillation.task_weight == 0.3
    assert_same_state(again.state_dict(), module.state_dict())


@pytest.mark.parametrize("wrong", ["loss", "output", "rows"])
def test_own_losses_are_named_scalars_without_their_sum(wrong, make_trainer, digits):
    class Mine(MultiTeacher):
        def compute_losses(self, x, target):
            found = super().compute_losses(x, target)
            return {**found, wrong: torch.zeros(3 if wrong == "rows" else ())}

    with pytest.raises(ValueError, match=rf"each a scalar, without their sum .*\['{wrong}'\]"):
        make_trainer().fit(Mine(TinyNet(), [TinyNet(8)]), datamodule=digits())


def test_a_teacher_that_did_not_run_adds_nothing_even_in_half_precision():
    core = Distillation(TinyNet(), [TinyNet(8), TinyNet(6)], weighting=Fixed([1.0, 0.0]))
    core.build(X)
    big = NetworkOutput(torch.full((64, 10), 3000.0, dtype=torch.half))
    core.student_output = lambda x: big
    assert core.losses_and_output(X[:1].expand(64, -1, -1, -1), None)[0]["soft_target"].isfinite()
