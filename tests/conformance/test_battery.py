"""What every paradigm and every method of this package keeps, each as its shipped YAML builds it.

A new method gets all of this with its YAML. Six batches of real digits each; the terminal summary
shows a table.
"""

import os

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lightning_kd import PeerCohort, SubTeacher
from lightning_kd.callbacks import Compile
from lightning_kd.data import ImageData
from lightning_kd.models import pretrained
from lightning_kd.teachers import TeacherCache
from tests.conformance.conftest import Terminator, build


def flat(state, prefix=""):
    """Every value of a state by its name, also what parts keep beside tensors."""
    found = {}
    for key, value in state.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def assert_same_state(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], (
            key
        )


def test_trains_and_touches_no_teacher(method):
    module, trainer = method.whole
    trained = [p for part in module.trainable_modules() for p in part.parameters()]
    before = [p for part in method.module.trainable_modules() for p in part.parameters()]
    assert len(before) <= len(trained)  # adapters come with the data
    learners = module.exported_networks()
    for name, network in method.module.exported_networks().items():
        old, new = network.state_dict(), learners[name].state_dict()
        assert any(not torch.equal(old[k], new[k]) for k in old), f"{name} did not learn"
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    networks = enumerate(method.teacher_networks())
    now = {f"{i}.{k}": v for i, n in networks for k, v in n.state_dict().items()}
    assert_same_state(now, method.kept["teachers"])
    held = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
    for network in method.teacher_networks():
        assert all(p.grad is None and id(p) not in held for p in network.parameters())


def test_resumed_equals_uninterrupted(method):
    module, _ = method.whole
    again, _ = method.fit(resume=method.checkpoint)
    assert_same_state(again.state_dict(), module.state_dict())


def test_sigterm_leaves_a_checkpoint_that_goes_on(method):
    """It ends behind the batch during which the signal came."""
    module, _ = method.whole
    folder = method.folder / "terminated"
    saver = ModelCheckpoint(folder, filename="best", save_top_k=0)
    with pytest.raises(SIGTERMException):
        method.fit(callbacks=[Terminator(), saver], enable_checkpointing=True)
    assert os.listdir(folder) == ["last.ckpt"]
    again, _ = method.fit(resume=folder / "last.ckpt")
    assert_same_state(again.state_dict(), module.state_dict())


def test_saved_config_builds_the_same_and_runs(method):
    path = method.folder / "saved" / "config.yaml"
    path.parent.mkdir()
    method.parser.save(method.config, path, skip_none=False, multifile=False)
    again = build(path, path.parent)
    assert again.module.hparams == method.module.hparams
    assert list(again.module.state_dict()) == list(method.module.state_dict())
    seen = [
        float(each.fit(max_epochs=1, limit_train_batches=1)[1].callback_metrics["train/loss"])
        for each in (method, again)
    ]
    assert seen[0] == seen[1]


def test_uneven_last_batch_and_no_validation(method):
    """A whole epoch whose last batch is one image."""
    _, data, _ = method.fresh()
    if not isinstance(data, ImageData):
        pytest.skip("batches of its own")
    before = dict(vars(method.data))
    method.data.subset = data.subset = 61
    data.setup("fit")
    count = len(data.training[1])
    method.data.batch_size = next(b for b in range(count // 3, 1, -1) if count % b == 1)
    if data.teacher_cache is not None:  # that there is, is of other images
        method.data.teacher_cache = TeacherCache(str(method.folder / "uneven"))
    try:
        _, trainer = method.fit(max_epochs=1, limit_train_batches=1.0, limit_val_batches=0)
    finally:
        vars(method.data).update(before)
    assert trainer.num_training_batches >= 3
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_same_seed_same_weights(method):
    module, _ = method.whole
    again, _ = method.fit()
    assert_same_state(again.state_dict(), module.state_dict())


def test_checkpoint_is_plain_and_holds_no_teacher(method):
    _ = method.whole
    saved = torch.load(method.checkpoint, weights_only=True)
    kept = saved["state_dict"]
    foreign = [v for v in method.kept["teachers"].values() if v.dim() > 1]
    for name, value in flat(kept).items():
        if not isinstance(value, torch.Tensor):
            continue
        same = [f for f in foreign if f.shape == value.shape and torch.equal(f, value)]
        assert not same, f"{name} is a teacher's"


def test_checkpoint_rebuilds_the_module(method):
    """``load_from_checkpoint`` with what it holds, and with the networks given."""
    _ = method.whole
    saved = torch.load(method.checkpoint, weights_only=True)["state_dict"]
    kind = type(method.module)
    alone = kind.load_from_checkpoint(method.checkpoint)
    assert_same_state(alone.state_dict(), saved)
    fresh, _, _ = method.fresh()
    given = {"peers": list(fresh.peers.networks)} if isinstance(fresh, PeerCohort) else {
        "student": fresh.student
    }  # fmt: skip
    assert_same_state(kind.load_from_checkpoint(method.checkpoint, **given).state_dict(), saved)


def test_export_gives_the_same_answers(method):
    module, _ = method.whole
    images = torch.rand(4, *module.distillation.input_shape)
    for name, network in module.exported_networks().items():
        mine = network.eval()(images)
        theirs = pretrained(str(method.folder / "export" / f"{name}.safetensors"))(images)
        torch.testing.assert_close(theirs, mine)


def test_bf16_is_close(method):
    """The first step's loss, and a whole run that stays finite."""
    first = {}
    for precision in ("32-true", "bf16-mixed"):
        _, trainer = method.fit(max_epochs=1, limit_train_batches=1, precision=precision)
        first[precision] = float(trainer.callback_metrics["train/loss"])
    _, trainer = method.fit(precision="bf16-mixed")
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    gap = abs(first["bf16-mixed"] - first["32-true"])
    assert gap <= 0.05 * abs(first["32-true"]) + 0.02, first


@pytest.mark.slow
def test_compiled_equals_plain(method):
    """Traced as torch.compile does, run by torch's own operations."""
    torch._dynamo.reset()
    compiled = Compile(options={"backend": "eager"})
    if isinstance(method.module, SubTeacher) or getattr(
        method.module.distillation, "stochastic_depth", None
    ):
        with pytest.raises(ValueError, match="run whole with Compile"):
            method.fit(callbacks=[compiled], max_epochs=1)
        return
    module, _ = method.fit(callbacks=[compiled], max_epochs=1)
    assert_same_state(module.state_dict(), method.fit(max_epochs=1)[0].state_dict())


def test_gradients_accumulate_or_that_is_refused(method):
    if method.module.automatic_optimization:
        _, trainer = method.fit(accumulate_grad_batches=2)
        assert trainer.global_step == 4  # three batches an epoch are two steps
        assert torch.isfinite(trainer.callback_metrics["train/loss"])
    else:
        with pytest.raises(MisconfigurationException, match="manual optimization"):
            method.fit(accumulate_grad_batches=2)


def test_a_batch_of_one_image_is_finite(method):
    if method.data_free:
        pytest.skip("makes its own images")
    module, _ = method.whole
    module = method.fit(max_epochs=1, limit_train_batches=1)[0]
    module.train()
    terms = module.compute_losses(
        torch.rand(1, *module.distillation.input_shape), torch.tensor([3])
    )
    assert terms
    assert all(torch.isfinite(value).all() for value in terms.values())
