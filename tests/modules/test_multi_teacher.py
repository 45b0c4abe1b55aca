"""Every loss and weighting inside the module: rules of the house, run by the Trainer."""

import pytest
import torch
from torch import nn

from lightning_kd import MultiTeacher, Teacher
from lightning_kd.losses import (
    FEED,
    MEAL,
    NST,
    PKT,
    AttentionTransfer,
    ConfidentHint,
    DecoupledKL,
    GramLoss,
    GraphDistillation,
    Hint,
    KnowledgeFlow,
    LogitMSE,
    LogitStandardization,
    Relational,
    SoftTarget,
    SubsetTarget,
)
from lightning_kd.models import Normalized, Resized
from lightning_kd.weighting import (
    AttentionOverLayers,
    Confidence,
    DomainSimilarity,
    Entropy,
    GradientSpace,
    LearnedGate,
    LowestLoss,
    SelfPaced,
    Switching,
    Uniform,
    save_domain,
)
from tests.conftest import assert_same_state, state_of

LOSSES = {
    "attention_transfer": lambda: AttentionTransfer("relu", "relu"),
    "confident_hint": lambda: ConfidentHint("flat", "flat", "linear"),
    "decoupled_kl": DecoupledKL,
    "feed": lambda: FEED("relu", "relu"),
    "gram_loss": lambda: GramLoss("relu", "relu", learn_weights=True),
    "graph_distillation": lambda: GraphDistillation("relu", "relu"),
    "hint": lambda: Hint("relu", "relu"),
    "knowledge_flow": lambda: KnowledgeFlow("relu", "relu"),
    "logit_mse": LogitMSE,
    "logit_standardization": LogitStandardization,
    "meal": lambda: MEAL("relu", "relu"),
    "nst": lambda: NST("relu", "relu"),
    "pkt": lambda: PKT("relu", "relu"),
    "relational": lambda: Relational("relu", "relu"),
    "soft_target": SoftTarget,
    "subset_target": SubsetTarget,
}
WEIGHTINGS = {
    "attention_over_layers": lambda folder: AttentionOverLayers("relu", "relu"),
    "confidence": lambda folder: Confidence(),
    "domain_similarity": lambda folder: DomainSimilarity(
        [str(folder / "0.domain"), str(folder / "1.domain")], "relu"
    ),
    "entropy": lambda folder: Entropy(),
    "gradient_space": lambda folder: GradientSpace(),
    "learned_gate": lambda folder: LearnedGate("relu"),
    "lowest_loss": lambda folder: LowestLoss(),
    "self_paced": lambda folder: SelfPaced(),
    "switching": lambda folder: Switching(),
    "uniform": lambda folder: Uniform(),
}


class Flat(nn.Module):
    """TinyNet whose last feature has a name."""

    def __init__(self, inner):
        super().__init__()
        self.conv, self.bn, self.relu = inner.conv, inner.bn, inner.relu
        self.dropout, self.linear, self.flat = inner.dropout, inner.linear, nn.Flatten()

    def forward(self, x):
        x = self.flat(self.relu(self.bn(self.conv(x))))
        return self.linear(self.dropout(x))


@pytest.fixture
def build(tiny, tmp_path):
    """A module of one loss and one weighting; equal arguments give equal weights."""

    def make(loss="soft_target", weighting="uniform", seed=1):
        torch.manual_seed(seed)
        networks = [Flat(tiny(8)), Flat(tiny(6))]
        student = Flat(tiny(4, dropout=0.3))
        if weighting == "domain_similarity":
            for index, network in enumerate(networks):
                images = [torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(index))]
                save_domain(tmp_path / f"{index}.domain", network, "relu", images)
        return MultiTeacher(
            student,
            networks,
            losses=[LOSSES[loss]()],
            weighting=WEIGHTINGS[weighting](tmp_path),
            task_weight=0.5,
        )

    return make


CASES = [(loss, "uniform") for loss in LOSSES] + [
    (loss, weighting)
    for weighting in WEIGHTINGS
    for loss in ("soft_target", "hint")
    if weighting != "uniform"
]


@pytest.mark.parametrize(("loss", "weighting"), CASES)
def test_method_trains_the_student_and_touches_no_teacher(
    loss, weighting, build, make_trainer, digits
):
    module = build(loss, weighting)
    before = [state_of(t.network) for t in module.teachers]
    student = state_of(module.student)
    grads = {}
    module.on_after_backward = lambda: grads.update(
        {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    )
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=digits())
    assert torch.isfinite(trainer.callback_metrics[f"train/{loss}"])
    for teacher, state in zip(module.teachers, before, strict=True):
        assert_same_state(teacher.network.state_dict(), state)
    assert not torch.equal(student["conv.weight"], module.student.conv.weight)
    given = {p.data_ptr() for t in module.teachers for p in t.network.parameters()}
    groups = trainer.optimizers[0].param_groups
    assert not given & {p.data_ptr() for g in groups for p in g["params"]}
    assert grads.keys() == dict(module.named_parameters()).keys()


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
@pytest.mark.parametrize(("loss", "weighting"), CASES)
def test_method_in_other_precisions(loss, weighting, precision, build, make_trainer, digits):
    module = build(loss, weighting)
    trainer = make_trainer(max_epochs=1, precision=precision, limit_train_batches=2)
    trainer.fit(module, datamodule=digits(subset=128))
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert all(p.isfinite().all() for p in module.parameters())


STATEFUL = [
    ("hint", "switching"), ("soft_target", "self_paced"), ("soft_target", "learned_gate"),
    ("soft_target", "domain_similarity"), ("hint", "attention_over_layers"),
    ("gram_loss", "uniform"), ("knowledge_flow", "uniform"), ("meal", "switching"),
    ("graph_distillation", "uniform"), ("feed", "gradient_space"),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "weighting"), STATEFUL)
def test_resumed_run_equals_the_uninterrupted_one(
    loss, weighting, build, make_trainer, digits, tmp_path
):
    whole = build(loss, weighting)
    data = digits()
    data.shuffle_seed = 3
    make_trainer(max_epochs=3).fit(whole, datamodule=data)
    half = build(loss, weighting)
    data = digits()
    data.shuffle_seed = 3
    trainer = make_trainer(max_epochs=1)
    trainer.fit(half, datamodule=data)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    content = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert not any("teacher" in key for key in content["state_dict"])
    resumed = build(loss, weighting, seed=7)
    for given, mine in zip(resumed.teachers, half.teachers, strict=True):
        given.network.load_state_dict(mine.network.state_dict())
    make_trainer(max_epochs=3).fit(
        resumed, datamodule=digits(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    got, wanted = resumed.state_dict(), whole.state_dict()
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        same = torch.equal(got[key], value) if torch.is_tensor(value) else got[key] == value
        assert same, key


def test_switching_asks_one_teacher_a_step_and_all_of_them_in_validation(
    build, make_trainer, digits
):
    module = build("soft_target", "switching")
    calls = {True: 0, False: 0}
    for teacher in module.teachers:
        teacher.network.register_forward_hook(
            lambda *_: calls.__setitem__(module.training, calls[module.training] + 1)
        )
    trainer = make_trainer(max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(module, datamodule=digits())
    assert calls[True] == trainer.global_step + 2  # of the dry run
    assert calls[False] == 2 * 2 * trainer.num_val_batches[0]
    shares = [float(trainer.callback_metrics[f"train/trust_{m}"]) for m in range(2)]
    assert sum(shares) == pytest.approx(1)
    assert min(shares) > 0


def test_what_nobody_reads_of_a_teacher_is_not_computed(tiny):
    networks = [tiny(8), tiny(6)]
    calls = []
    for network in networks:
        network.linear.register_forward_hook(lambda *_: calls.append(1))
    x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    for losses, weighting, ran in (
        ([Hint("relu", "conv"), NST("relu", "relu")], Uniform(), 0),
        ([Hint("relu", "relu")], Confidence(), 2),
        ([Hint("relu", "relu"), SoftTarget()], Uniform(), 2),
    ):
        module = MultiTeacher(tiny(4), networks, losses=losses, weighting=weighting)
        module._build(x)
        calls.clear()
        terms = module.compute_losses(x, y)
        assert len(calls) == ran
        said = module.distillation.teacher_outputs(x, [0])[0]
        again = module.distillation.teacher_outputs(x, [0], need_logits=ran > 0)[0]
        assert all(torch.equal(said.features[k], again.features[k]) for k in said.features)
        assert said.logits.shape == (4, 10)
        torch.stack(list(terms.values())).sum().backward()


def test_distillation_stops_when_the_student_has_caught_up(build, make_trainer, digits):
    module = build("hint", "self_paced")
    module._build(torch.zeros(1, 1, 8, 8))
    module.distillation.weighting.load_state_dict({"expert_weights": torch.zeros(2)})
    x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    terms = module.compute_losses(x, y)
    assert float(terms["hint"].detach()) == 0.0
    assert float(terms["task"].detach()) > 0
    module.compute_losses(x, torch.full((4,), -1))[
        "hint"
    ].backward()  # nothing to learn, and no error


def test_gate_is_logged_and_learns(build, make_trainer, digits):
    module = build("soft_target", "learned_gate")
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=digits())
    assert float(trainer.callback_metrics["train/gate"]) > 0
    trust = [float(trainer.callback_metrics[f"train/trust_{m}"]) for m in range(2)]
    assert sum(trust) == pytest.approx(1)
    assert trust[0] != trust[1]
    assert module.distillation.weighting.gate.weight.abs().sum() > 0


def test_measured_ensemble_does_not_see_the_labels(build, make_trainer, digits):
    """Weighing by the right answer would make any ensemble look good."""
    module = build("soft_target", "lowest_loss")
    data = digits()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=data)
    right, seen = 0, 0
    for images, labels in data.val_dataloader():
        x = images.float() / 255
        answers = torch.stack([t(x).logits for t in module.teachers])
        sure = -torch.distributions.Categorical(logits=answers).entropy()
        chosen = answers[sure.argmax(0), torch.arange(len(x))]
        right, seen = right + int((chosen.argmax(1) == labels).sum()), seen + len(labels)
    assert float(trainer.callback_metrics["val/ensemble/accuracy"]) == pytest.approx(right / seen)


def test_teachers_of_other_resolution_and_normalisation(tiny, make_trainer, digits):
    student = tiny(4)
    small = Resized(tiny(8), 8)
    other = Resized(Normalized(nn.Sequential(nn.AvgPool2d(2), tiny(6)), [0.5], [0.2]), 16)
    module = MultiTeacher(student, [small, other], losses=[SoftTarget(), Hint("relu", "relu")])
    with pytest.raises(ValueError, match="Near names"):
        make_trainer().fit(module, datamodule=digits())
    module = MultiTeacher(
        student, [small, other], losses=[SoftTarget(), Hint("relu", ["relu", "1.relu"])]
    )
    x = torch.rand(2, 1, 8, 8)
    module._build(x)
    with torch.no_grad():
        said = module.teachers[1](x)
    up = torch.nn.functional.interpolate(x, (16, 16), mode="bilinear", align_corners=False)
    wanted = other.network.network((up - 0.5) / 0.2)
    torch.testing.assert_close(said.logits, wanted)
    make_trainer(max_epochs=1).fit(module, datamodule=digits())
    with pytest.raises(ValueError, match="size >= 1"):
        Resized(tiny(), 0)


def test_teachers_of_different_classes_teach_one_student(tiny, make_trainer, digits):
    experts = [
        Teacher(tiny(8, num_classes=5), [0, 1, 2, 3, 4], 10),
        Teacher(tiny(6, num_classes=7), [3, 4, 5, 6, 7, 8, 9], 10),
    ]
    module = MultiTeacher(tiny(4), experts, losses=[SubsetTarget()], weighting=SelfPaced())
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=digits())
    assert trainer.callback_metrics["val/teacher_0/accuracy"] < 1
    assert module.distillation.weighting.known[0].sum() == 5
