"""Faults that a review of the cores found: precision, copies, loops of one's own, teachers."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_kd import Cohort, Distillation, MultiTeacher, PeerCohort, Teacher
from lightning_kd.exchange import (
    Attention,
    Codistillation,
    Collective,
    Fusion,
    Gate,
    PeerCollaborative,
)
from lightning_kd.losses import (
    FEED,
    MEAL,
    ConfidentHint,
    GramLoss,
    Hint,
    KnowledgeFlow,
    LogitMSE,
    SoftTarget,
)
from lightning_kd.models import MultiBranch
from lightning_kd.outputs import NetworkOutput, TeacherOutputs
from lightning_kd.weighting import Fixed, LearnedGate, save_domain
from tests.conftest import TinyNet, assert_same_state, state_of

X, Y = torch.rand(8, 1, 8, 8), torch.arange(8) % 10


def precisions(module):
    return {p.dtype for p in module.parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_that_are_made_under_autocast_have_the_students_precision(dtype):
    parts = Distillation(
        TinyNet(),
        [TinyNet(8)],
        [Hint("relu", "relu"), KnowledgeFlow("conv", "conv")],
        LearnedGate("relu"),
    )
    with torch.autocast("cpu", dtype):
        parts(X, Y)["loss"].backward()
    assert precisions(parts) == {torch.float32}
    parts(X, Y)["loss"].backward()
    hint, conv = Hint("a", "b"), nn.Conv2d(1, 4, 3)
    with torch.autocast("cpu", dtype):
        hint(conv(X), torch.rand(8, 6, 6, 6))
    assert precisions(hint) == {torch.float32}
    hint(conv(X), torch.rand(8, 6, 6, 6)).backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "exchange",
    [
        lambda: Attention("relu"),
        lambda: Gate("relu"),
        lambda: Fusion("relu"),
        lambda: PeerCollaborative("relu"),
        None,
    ],
)
def test_a_cohort_has_the_precision_of_its_peers(exchange, dtype):
    losses = None if exchange else [Hint("relu", "relu")]
    cohort = Cohort([TinyNet() for _ in range(3)], exchange and exchange(), losses).to(dtype)
    assert torch.isfinite(cohort(X.to(dtype), Y)["loss"])
    assert precisions(cohort) == {dtype}


@pytest.mark.parametrize("exchange", [Codistillation, lambda: PeerCollaborative("relu")])
def test_a_loop_of_ones_own_moves_the_shadow(exchange):
    cohort = Cohort([TinyNet(), TinyNet()], exchange())
    cohort(X, Y)
    before = state_of(cohort.exchange.shadow)
    with torch.no_grad():
        for p in cohort.peers.parameters():
            p.add_(1.0)
    for _ in range(50):
        cohort.after_step()
    after = state_of(cohort.exchange.shadow)
    assert all(not torch.equal(before[k], after[k]) for k in before if k.endswith("weight"))


def test_a_loop_that_forgets_the_shadow_is_told():
    cohort = Cohort([TinyNet(), TinyNet()], Codistillation(burn_in=3))
    for _ in range(99):
        cohort(X[:2], Y[:2])
    with pytest.warns(UserWarning, match=r"call after_step\(\) after each optimizer step"):
        cohort(X[:2], Y[:2])


def test_a_cohort_checks_teachers_as_one_student_does():
    some = Teacher(TinyNet(num_classes=2), [0, 1], 10)
    with pytest.raises(ValueError, match="know all classes with LogitMSE"):
        Cohort([TinyNet(), TinyNet()], teachers=[some], teacher_losses=[LogitMSE()])(X, Y)
    pair = [TinyNet(), TinyNet()]
    with pytest.raises(ValueError, match="one weight for each of 2 teachers"):
        Cohort([TinyNet(), TinyNet()], teachers=pair, weighting=Fixed([1.0]))(X, Y)


def test_losses_inside_networks_are_refused_on_branches():
    hint = ConfidentHint("relu", "relu", "linear")
    with pytest.raises(ValueError, match="peers that run apart"):
        PeerCohort([MultiBranch(TinyNet(), "relu", 2)], teachers=[TinyNet()], teacher_losses=[hint])


@pytest.mark.parametrize(
    "exchange",
    [lambda: Fusion("relu"), Collective, lambda: PeerCollaborative("relu")],
)
def test_feature_losses_are_refused_where_a_teacher_has_no_layers(exchange):
    cohort = Cohort([TinyNet(), TinyNet()], exchange(), [Hint("relu", "relu")])
    with pytest.raises(ValueError, match=r"losses on logits with \w+, got Hint"):
        cohort(X, Y)


def test_a_teacher_that_is_asked_after_it_was_given_back_is_given_back_again(make_trainer, digits):
    network = TinyNet(8).train()
    module = MultiTeacher(TinyNet(), [network])
    make_trainer(max_epochs=1).fit(module, datamodule=digits())
    assert network.training
    module.distillation(X, Y)
    module.teachers.release()
    assert network.training
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_precision_of_a_run_is_not_that_of_the_users_teacher(precision, make_trainer, digits):
    network = TinyNet(8)
    before = state_of(network)
    module = MultiTeacher(TinyNet(), [network])
    make_trainer(max_epochs=1, precision=precision).fit(module, datamodule=digits())
    assert_same_state(state_of(network), before)
    assert precisions(network) == {torch.float32}
    plain = Distillation(TinyNet(), network).bfloat16()
    plain(X.bfloat16(), Y)
    plain.teachers.release()
    assert_same_state(state_of(network), before)


def test_a_copy_takes_a_teacher_of_its_own_where_it_moves():
    distillation = Distillation(TinyNet(), [TinyNet(8)], [Hint("relu", "relu")])
    distillation(X, Y)
    before = state_of(distillation.teachers[0].network)
    twin = copy.deepcopy(distillation)
    assert twin.teachers[0].network is distillation.teachers[0].network
    twin.double()
    expected = distillation(X, Y)["loss"].double()
    torch.testing.assert_close(twin(X.double(), Y)["loss"], expected, rtol=1e-5, atol=1e-6)
    assert_same_state(state_of(distillation.teachers[0].network), before)
    other = copy.deepcopy(distillation)
    other.teachers[0].record_layers(["conv"])
    distillation(X, Y)


def test_a_copy_flows_as_its_original_does():
    torch.manual_seed(0)
    original = Distillation(TinyNet(), [TinyNet(8)], [KnowledgeFlow("conv", "conv")])
    original.build(X)
    twin = copy.deepcopy(original)
    torch.testing.assert_close(twin(X, Y)["task"], original(X, Y)["task"], rtol=0, atol=0)


def test_nothing_flows_after_a_step_that_failed():
    parts = Distillation(TinyNet(), [TinyNet(8)], [KnowledgeFlow("conv", "conv")])
    parts.build(X)
    expected = parts.student(X)
    with pytest.raises(ValueError, match="labels from 0 to 9"):
        parts(X, torch.full((8,), 99))
    torch.testing.assert_close(parts.student(X), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Hint, FEED, MEAL])
def test_losses_on_objects_are_sized_at_first_use(kind):
    student = NetworkOutput(torch.randn(4, 10), {"a": torch.randn(4, 3, 4, 4)})
    teacher = NetworkOutput(torch.randn(4, 10), {"b": torch.randn(4, 5, 4, 4)})
    loss = kind("a", "b")
    assert torch.isfinite(loss(student, TeacherOutputs.uniform([teacher]), torch.zeros(4).long()))


def test_learned_weights_of_gram_matrices_want_logits_and_say_so():
    loss = GramLoss("a", "a", learn_weights=True)
    with pytest.raises(TypeError, match="use it inside Distillation"):
        loss(torch.rand(4, 3), torch.rand(4, 3), torch.zeros(4).long())


def test_weights_of_gram_matrices_are_learned_in_half_precision_as_in_single():
    torch.manual_seed(0)
    feature, map_ = torch.randn(6, 8), torch.randn(8, 5)
    others = [torch.randn(6, 8), torch.randn(6, 8)]
    learned = []
    for dtype in (torch.float32, torch.float16):
        own = feature.to(dtype).requires_grad_()
        student = NetworkOutput(own @ map_.to(dtype), {"a": own})
        outputs = [NetworkOutput(torch.zeros(6, 5), {"a": o.to(dtype)}) for o in others]
        loss = GramLoss("a", "a", learn_weights=True)
        loss(student, TeacherOutputs.uniform(outputs), torch.arange(6) % 5)
        learned.append(loss.trust.float())
    assert (learned[0] - 0.5).abs().max() > 1e-4
    torch.testing.assert_close(learned[1], learned[0], rtol=0, atol=2e-5)


def test_the_gate_of_dense_outputs_is_trained_by_labelled_positions_alone():
    torch.manual_seed(0)
    gate, logits = LearnedGate(), torch.randn(2, 5, 4)
    teachers = [NetworkOutput(torch.randn(2, 5, 4)) for _ in range(2)]
    student = NetworkOutput(logits)
    gate.build(student, teachers)
    target = torch.tensor([[1, 2, -1, -1], [3, -1, -1, -1]])
    gate(student, teachers, target)
    got = gate.loss(TeacherOutputs.uniform(teachers), target)
    mean = torch.stack([t.logits.softmax(1) for t in teachers]).mean(0).log()
    first = -(mean[0, 1, 0] + mean[0, 2, 1]) / 2
    torch.testing.assert_close(got, (first - mean[1, 3, 0]) / 2)


def test_layers_of_a_shadow_are_found_again():
    cohort = Cohort([TinyNet(), TinyNet()], Codistillation(), [Hint("bn", "bn")])
    cohort.build(X)
    cohort = nn.SyncBatchNorm.convert_sync_batchnorm(cohort)
    assert isinstance(cohort.exchange.shadow.peers.networks[0].bn, nn.SyncBatchNorm)
    cohort.attach()
    cohort.eval()  # SyncBatchNorm trains on GPUs alone
    assert torch.isfinite(cohort(X, Y)["loss"])


def test_memory_is_told_apart():
    """By what is shared, not by where a tensor begins."""
    flat = torch.randn(4 * 1 * 9 + 20)
    student, teacher, third = TinyNet(), TinyNet(), TinyNet()
    student.conv.weight.data = flat[:36].view(4, 1, 3, 3)
    teacher.conv.weight.data = flat[20:56].view(4, 1, 3, 3)
    with pytest.raises(ValueError, match="shared weights"):
        Distillation(student, teacher)
    third.conv.weight.data = flat[36:56].repeat(2)[:36].view(4, 1, 3, 3)
    Distillation(student, third)
    peers = [TinyNet(), TinyNet(), TinyNet()]
    peers[2].bn.running_mean = peers[0].bn.running_mean
    with pytest.raises(ValueError, match="peers 0 and 2 share"):
        Cohort(peers)
    with torch.device("meta"):
        Cohort([TinyNet(), TinyNet()])


def test_saving_a_domain_leaves_the_network_as_it_was(tmp_path):
    network = TinyNet().train()
    save_domain(tmp_path / "d.safetensors", network, "relu", [X])
    assert network.training
    assert network.bn.training


def test_a_gate_that_measured_can_be_copied():
    parts = Distillation(TinyNet(), [TinyNet(8)], [SoftTarget()], LearnedGate("relu"))
    parts.build(X)
    parts.update_metrics(parts.metrics(), X, Y, observe=False)
    copy.deepcopy(parts)
    pickle.dumps(parts.weighting)


@pytest.mark.parametrize("offload", [False, True])
def test_a_teacher_at_lower_cost_is_whole_again_after_release(offload):
    network = TinyNet(8).eval()
    expected, before = network(X), state_of(network)
    teacher = Teacher(network)
    teacher.reduce_cost(torch.bfloat16, offload)
    assert not torch.equal(teacher(X).logits, expected)
    teacher.release()
    assert_same_state(state_of(network), before)
    assert teacher._dtype == (torch.float32 if offload else None)  # what images are cast to
    torch.testing.assert_close(teacher(X).logits, expected, rtol=0, atol=0)
