"""Faults of cohorts that were found once, each with the test that would have found it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd.exchange import Codistillation, Collective, Fusion, Gate, PeerCollaborative
from lightning_kd.losses import KnowledgeFlow
from lightning_kd.models import MultiBranch
from lightning_kd.modules import PeerCohort
from lightning_kd.strategies import divide


def loader(count, batch_size=8, labelled=True):
    x = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(count) % 10 if labelled else torch.full((count,), -1)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def test_clipping_works_with_a_gradient_scaler(tiny, make_trainer):
    """fp16 on a CPU: Lightning unscales inside the step, so nobody may before."""
    ends = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        module = PeerCohort([tiny(4), tiny(4)], clip_norm=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        plugin.forward_context = lambda: torch.autocast("cpu", enabled=False)
        make_trainer(max_epochs=1, plugins=[plugin]).fit(module, loader(32))
        ends.append(copy.deepcopy(module.state_dict()))
    for key, value in ends[0].items():
        if torch.is_tensor(value):
            torch.testing.assert_close(ends[1][key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("exchange", [lambda: Codistillation(2), lambda: PeerCollaborative("relu")])
def test_checkpoint_inside_an_epoch_holds_the_shadow_of_its_step(
    tiny, make_trainer, digits, tmp_path, exchange
):
    def make():
        torch.manual_seed(1)
        return PeerCohort([tiny(4), tiny(4)], exchange())

    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    whole = make()
    trainer = make_trainer(max_epochs=2, callbacks=[saver], enable_checkpointing=True)
    trainer.fit(whole, datamodule=digits())
    half = tmp_path / "step=3.ckpt"
    state = torch.load(half, weights_only=True)["state_dict"]
    assert state["distillation.exchange._extra_state"]["steps"] == 3
    again = make()
    make_trainer(max_epochs=2).fit(again, datamodule=digits(), ckpt_path=half)
    for key, value in whole.state_dict().items():
        same = torch.equal(value, again.state_dict()[key]) if torch.is_tensor(value) else True
        assert same, key


def test_exchange_counts_steps_not_batches(tiny, make_trainer):
    module = PeerCohort([tiny(4), tiny(4)], Codistillation(2))
    make_trainer(max_epochs=1, accumulate_grad_batches=3).fit(module, loader(48))
    assert module.exchange.steps == 2


def test_batched_peers_refuse_what_one_run_cannot_do(tiny):
    flow = KnowledgeFlow("relu", "relu")
    with pytest.raises(ValueError, match="run apart"):
        PeerCohort([tiny(4), tiny(4)], batched=True, teachers=[tiny(4)], teacher_losses=[flow])
    module = PeerCohort([tiny(4), tiny(4)], batched=True)
    module._build(torch.rand(2, 1, 8, 8))
    module.peers.networks[1].bn.eval()
    with pytest.raises(ValueError, match="one mode"):
        module.compute_losses(torch.rand(4, 1, 8, 8), torch.arange(4))


class FunctionalDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x):
        return self.last(F.dropout(self.first(x.flatten(1)), 0.5, self.training))


def test_branches_refuse_a_mode_that_tracing_would_freeze():
    network = FunctionalDropout().eval()
    with pytest.raises(ValueError, match=r"nn\.Dropout"):
        MultiBranch(network, "first", 2)
    assert not network.training
    assert not network.first.training


def test_means_of_a_broken_run_do_not_reach_the_next(tiny, make_trainer):
    class Breaks(Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("stop")

    module = PeerCohort([tiny(4), tiny(4)])
    with pytest.raises(RuntimeError, match="stop"):
        make_trainer(callbacks=[Breaks()]).fit(module, loader(32))
    twin = PeerCohort([tiny(4), tiny(4)])
    twin._build(torch.rand(2, 1, 8, 8))
    twin.load_state_dict(module.state_dict())
    ends = []
    for one in (module, twin):
        trainer = make_trainer(max_epochs=1)
        trainer.fit(one, loader(32))
        ends.append(float(trainer.callback_metrics["train/loss"]))
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)


def test_a_validation_of_its_own_teaches_nothing(tiny, make_trainer):
    module = PeerCohort([tiny(4), tiny(6)], Collective("general"))
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader(32), loader(32))
    before = module.exchange.shares.clone()
    assert not torch.allclose(before, torch.full((2,), 0.5))
    trainer.validate(module, loader(16), verbose=False)
    assert torch.equal(module.exchange.shares, before)


@pytest.mark.parametrize(
    "exchange", [lambda: Gate("bn"), lambda: Fusion("pool")], ids=["gate", "fusion"]
)
def test_a_last_batch_of_one_sample_is_taken(make_trainer, exchange):
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
            self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 10)

        def forward(self, x):
            return self.fc(self.pool(self.bn(self.conv(x))).flatten(1))

    module = PeerCohort([Small(), Small()], exchange())
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader(17))
    assert trainer.global_step == 3
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_a_frozen_peer_has_no_process_of_its_own(tiny):
    module = PeerCohort([tiny(4), tiny(4).requires_grad_(False)])
    divide(module.distillation, 0, 2)
    with pytest.raises(ValueError, match="without a parameter"):
        divide(module.distillation, 1, 2)


@pytest.mark.parametrize("options", [{"clip_norm": 1.0}, {"update": "sequential"}])
def test_nothing_to_learn_from_is_reported(tiny, make_trainer, options):
    module = PeerCohort([tiny(4), tiny(4)], losses=[], task_weight=0.0, **options)
    with pytest.raises(ValueError, match="at least one loss"):
        make_trainer().fit(module, loader(16, labelled=False))
