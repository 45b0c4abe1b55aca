"""Faults that an independent reading of the methods found; each of these failed once."""

import copy

import pytest
import torch
from torch import nn

from lightning_kd import MultiTeacher, Teacher
from lightning_kd.functional import (
    combine_teachers,
    confidence_weights,
    log_euclidean_distance,
    simplex_projection,
    task_cross_entropy,
)
from lightning_kd.losses import (
    GramLoss,
    Hint,
    KnowledgeFlow,
    LogitMSE,
    LogitStandardization,
    SoftTarget,
    SubsetTarget,
)
from lightning_kd.outputs import NetworkOutput, TeacherOutputs
from lightning_kd.weighting import (
    AttentionOverLayers,
    Confidence,
    GradientSpace,
    LearnedGate,
    SelfPaced,
)

X, Y = torch.rand(8, 1, 8, 8), torch.arange(8)


def test_fit_after_a_validation_of_its_own(make_module, make_trainer, digits):
    module, data = make_module(), digits()
    make_trainer().validate(module, datamodule=data, verbose=False)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=data)
    make_trainer().validate(module, datamodule=data, verbose=False)
    again = make_trainer(max_epochs=1)
    again.fit(module, datamodule=data)
    assert "val/accuracy" in trainer.callback_metrics
    assert "val/accuracy" in again.callback_metrics


def experts(tiny):
    return [Teacher(tiny(8, num_classes=5), range(5), 10), tiny(6)]


def test_a_teacher_that_does_not_know_the_label_gets_no_confidence(tiny):
    logits = torch.tensor([[[0.0, 1.0, -torch.inf]], [[0.0, 1.0, 2.0]]])
    assert confidence_weights(logits, torch.tensor([2])).tolist() == [[0.0], [1.0]]
    module = MultiTeacher(tiny(4), experts(tiny), losses=[SubsetTarget()], weighting=Confidence())
    module._build(X)
    terms = module.compute_losses(X, Y)
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad.isfinite().all() for p in module.student.parameters())


@pytest.mark.parametrize("space", ["probability", "logit"])
def test_a_label_that_no_teacher_knows_teaches_the_gate_nothing(space):
    partial = torch.tensor([[1.0, 2.0, -torch.inf]] * 2)
    teachers = [NetworkOutput(partial), NetworkOutput(partial - 1)]
    gate = LearnedGate(space=space)
    gate.build(NetworkOutput(torch.randn(2, 3)), teachers)
    weights = gate(NetworkOutput(torch.randn(2, 3)), teachers, None)
    loss = gate.loss(TeacherOutputs(teachers, weights, space), torch.tensor([2, 0]))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in gate.parameters())


def test_knowledge_still_flows_where_the_layer_was_replaced_or_the_module_copied(tiny):
    module = MultiTeacher(tiny(4), [tiny(6)], losses=[KnowledgeFlow("bn", "bn")])
    module._build(X)
    module.student = nn.SyncBatchNorm.convert_sync_batchnorm(module.student)
    assert not module.student.bn._forward_hooks or len(module.student.bn._forward_hooks) < 2
    module.distillation.attach()
    assert len(module.student.bn._forward_hooks) == 2  # the tap's and the flow's
    module = MultiTeacher(tiny(4), [tiny(6)], losses=[KnowledgeFlow("bn", "bn")])
    module._build(X)
    twin = copy.deepcopy(module)
    twin.distillation.attach()
    torch.stack(list(twin.compute_losses(X, Y).values())).sum().backward()
    flow = twin.distillation.losses["knowledge_flow"]
    assert all(p.grad is not None for p in flow.projections.parameters())
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize(
    ("count", "loss"), [(1, SoftTarget), (2, lambda: KnowledgeFlow("relu", "relu"))]
)
def test_attention_gets_a_gradient_even_where_no_loss_asks_for_it(count, loss, tiny):
    module = MultiTeacher(
        tiny(4), [tiny(6) for _ in range(count)], losses=[loss()],
        weighting=AttentionOverLayers("relu", "relu"),
    )  # fmt: skip
    module._build(X)
    torch.stack(list(module.compute_losses(X, Y).values())).sum().backward()
    assert all(p.grad is not None for p in module.distillation.weighting.parameters())


def test_students_gradient_is_zero_not_missing_when_nobody_teaches(tiny):
    module = MultiTeacher(
        tiny(4), [tiny(6)], losses=[Hint("relu", "relu")], weighting=SelfPaced(), task_weight=0.0
    )
    module._build(X)
    module.distillation.weighting.load_state_dict({"expert_weights": torch.zeros(1)})
    torch.stack(list(module.compute_losses(X, Y).values())).sum().backward()
    assert all(p.grad is not None for p in module.student.parameters())


def test_learned_gram_weights_move_under_half_precision(tiny):
    torch.manual_seed(0)
    module = MultiTeacher(
        tiny(16), [tiny(6), tiny(8)],
        losses=[GramLoss("relu", "relu", learn_weights=True, learning_rate=10.0)],
    )  # fmt: skip
    x, y = torch.rand(64, 1, 8, 8), torch.arange(64) % 10
    module._build(x)
    trusts = []
    for kind in (torch.float16, torch.float32):
        loss = module.distillation.losses["gram_loss"]
        loss.trust.fill_(0.5)
        with torch.autocast("cpu", kind, enabled=kind == torch.float16):
            module.compute_losses(x, y)
        trusts.append(loss.trust.clone())
    assert (trusts[0] - 0.5).abs().max() > 1e-3
    torch.testing.assert_close(trusts[0], trusts[1], atol=0.02, rtol=0)


def test_nan_features_give_a_nan_loss_and_no_strange_error():
    nan = torch.full((3, 4), torch.nan, requires_grad=True)
    assert log_euclidean_distance(nan, torch.rand(3, 4)).isnan()
    simplex_projection(torch.tensor([torch.nan, 1.0]))
    loss = GramLoss("a", "a", learn_weights=True)
    student = NetworkOutput(nan * 1.0, {"a": nan})
    teacher = NetworkOutput(torch.rand(3, 4), {"a": torch.rand(3, 4)})
    loss.build(student, [teacher])
    assert loss(student, TeacherOutputs([teacher], torch.ones(1)), torch.tensor([0, 1, 2])).isnan()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_counts_and_running_weights_stay_in_full_precision(kind):
    student, teacher = NetworkOutput(torch.randn(25, 4)), NetworkOutput(torch.randn(25, 4))
    paced = SelfPaced()
    paced.build(student, [teacher])
    paced.to(kind)
    for _ in range(400):
        paced.observe(student, [teacher], torch.arange(25) % 4)
    assert float(paced.counts[0, 0]) == 10_000
    gram = GramLoss("a", "a", learn_weights=True)
    gram.build(student, [teacher])
    assert gram.to(kind).trust.dtype == torch.float32


def test_module_that_already_has_the_precision_of_the_run(make_module, make_trainer, digits):
    module = make_module().double()
    trainer = make_trainer(max_epochs=1, precision="64-true")
    trainer.fit(module, datamodule=digits())
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert module.student.conv.weight.dtype == torch.float64


def test_copy_that_is_cast_leaves_the_teacher_alone(make_module):
    module = make_module()
    module._build(X)
    copy.deepcopy(module).double()
    assert module.teachers[0].network.conv.weight.dtype == torch.float32
    module.double()  # its owner moves it
    assert module.teachers[0].network.conv.weight.dtype == torch.float64


def test_part_of_a_teacher_put_into_train_mode_is_put_back(tiny):
    teacher = Teacher(tiny(4))
    teacher.network.bn.train()
    before = teacher.network.bn.running_mean.clone()
    teacher(X)
    assert torch.equal(teacher.network.bn.running_mean, before)


def test_teachers_of_some_classes_and_losses_that_cannot_take_them(tiny):
    logits = torch.stack([torch.tensor([[1.0, -torch.inf]]), torch.tensor([[0.0, 2.0]])])
    answer = combine_teachers(logits, torch.tensor([0.0, 1.0]), 1.0, "logit")
    torch.testing.assert_close(answer, logits[1].log_softmax(1))
    for loss in (LogitMSE(), LogitStandardization()):
        module = MultiTeacher(tiny(4), experts(tiny), losses=[loss])
        with pytest.raises(ValueError, match="teachers that know all classes"):
            module._build(X)


def test_dense_outputs_average_over_labelled_positions():
    logits, target = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    target[:, :2] = -1
    wanted = torch.nn.functional.cross_entropy(logits, target, ignore_index=-1)
    torch.testing.assert_close(task_cross_entropy(logits, target).mean(), wanted)
    gate, teacher = LearnedGate(), NetworkOutput(torch.randn(2, 3, 4, 4))
    gate.build(NetworkOutput(logits), [teacher])
    weights = gate(NetworkOutput(logits), [teacher], None)
    loss = gate.loss(TeacherOutputs([teacher], weights), target.clamp(min=0))
    wanted = torch.nn.functional.cross_entropy(teacher.logits, target.clamp(min=0))
    torch.testing.assert_close(loss, wanted)


def test_last_batch_of_one_sample_and_a_map_of_one_position():
    student = NetworkOutput(torch.randn(1, 3), {"a": torch.randn(1, 4, 1, 1)})
    teacher = NetworkOutput(torch.randn(1, 3), {"a": torch.randn(1, 6, 1, 1)})
    loss = Hint("a", "a").train()
    loss.build(student, [teacher])
    assert loss(student, TeacherOutputs([teacher], torch.ones(1)), None).isfinite()


def test_smaller_points(tiny):
    assert list(GradientSpace().active(1)) == [0]
    teacher = Teacher(tiny(4))
    with pytest.raises(ValueError, match="got one twice"):
        MultiTeacher(tiny(4), [teacher, teacher])
    gate = LearnedGate()  # of two classes it sees how sure the student is, not only of which
    gate.build(NetworkOutput(torch.randn(1, 2)), [NetworkOutput(torch.randn(1, 2))])
    sure, unsure = (gate._embed(NetworkOutput(torch.tensor([[z, 0.0]]))) for z in (8.0, 0.1))
    assert not torch.allclose(sure, unsure, atol=0.1)
