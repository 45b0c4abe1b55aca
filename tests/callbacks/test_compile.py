"""Compiled networks train to the weights of plain ones."""

import copy

import pytest
import torch
from lightning.pytorch import Callback

from lightning_kd import MultiTeacher, PeerCohort, SubTeacher, Supervised
from lightning_kd.callbacks import Compile
from lightning_kd.losses import Hint, SoftTarget
from lightning_kd.teachers import NoisyTeacher, StochasticDepth
from tests.conftest import TinyNet, assert_same_state

TRACED = {"options": {"backend": "eager"}}  # traced as always, but run by torch's own operations


def make(losses):
    torch.manual_seed(1)
    return MultiTeacher(TinyNet(), [TinyNet(8), TinyNet(6)], copy.deepcopy(losses))


@pytest.mark.parametrize(
    "losses", [[SoftTarget()], [SoftTarget(), Hint("relu", "relu")], [Hint("relu", "relu")]]
)
def test_compiled_run_equals_a_plain_one(make_trainer, digits, losses):
    states, calls = [], []
    for callbacks in ([], [Compile(**TRACED)]):
        torch._dynamo.reset()
        torch.manual_seed(0)
        module, data = make(losses), digits()
        data.shuffle_seed = 3
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        make_trainer(max_epochs=1, callbacks=callbacks).fit(module, datamodule=data)
        calls.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
        states.append(module.state_dict())
        networks = [module.student, *module.teachers.networks()]
        assert all(network._compiled_call_impl is None for network in networks)
    assert_same_state(*states)
    assert calls[0] == 0
    assert calls[1] >= 3  # student and two teachers


def test_a_tapped_network_is_one_graph(make_trainer, digits):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = make([SoftTarget(), Hint("relu", "relu")])
    data = digits(drop_last=True)
    make_trainer(max_epochs=1, limit_val_batches=0, callbacks=[Compile(**TRACED)]).fit(
        module, datamodule=data
    )
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


def test_every_network_of_every_fit_is_compiled(make_trainer, digits):
    """Dynamo gives up on code that it has compiled eight times, without an error."""
    torch._dynamo.reset()
    called = []

    def backend(graph, example):
        return lambda *args: called.append(1) or graph(*args)

    for _ in range(3):
        module = MultiTeacher(TinyNet(), [TinyNet(4 + k) for k in range(8)])
        called.clear()
        make_trainer(
            max_epochs=1, limit_train_batches=3, limit_val_batches=0,
            callbacks=[Compile(options={"backend": backend})],
        ).fit(module, datamodule=digits())  # fmt: skip
        assert len(called) == 2 * 9  # the first step is plain


def test_an_exception_leaves_plain_networks(make_trainer, digits):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("stop")

    module = make([SoftTarget()])
    with pytest.raises(RuntimeError, match="stop"):
        make_trainer(callbacks=[Compile(**TRACED), Stop()]).fit(module, datamodule=digits())
    assert all(n._compiled_call_impl is None for n in [module.student, *module.teachers.networks()])


def test_features_that_a_layer_changes_in_place_are_reported(make_trainer, digits):
    class InPlace(TinyNet):
        def forward(self, x):
            x = torch.nn.functional.dropout(self.conv(x), 0.5, self.training, inplace=True)
            return self.linear(self.relu(self.bn(x)).flatten(1))

    module = MultiTeacher(InPlace(), [TinyNet()], [Hint("conv", "conv")])
    with pytest.raises(RuntimeError, match="changed in place"):
        make_trainer(callbacks=[Compile(**TRACED)]).fit(module, datamodule=digits())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SubTeacher(TinyNet(), TinyNet(), NoisyTeacher(2)),
            "teacher that is run in parts",
        ),
        (
            lambda: Supervised(TinyNet(), stochastic_depth=StochasticDepth(1)),
            "path changes at each step",
        ),
        (lambda: PeerCohort([TinyNet(), TinyNet()], batched=True), "batched=True"),
    ],
)
def test_networks_run_in_parts_are_refused(make_trainer, digits, make, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(callbacks=[Compile()]).fit(make(), datamodule=digits())


@pytest.mark.slow
def test_compiled_code_is_close(make_trainer, digits):
    """With the compiler that users get; it needs one for C++."""
    states = []
    for callbacks in ([], [Compile()]):
        torch.manual_seed(0)
        module, data = make([SoftTarget()]), digits()
        data.shuffle_seed = 3
        make_trainer(max_epochs=1, callbacks=callbacks).fit(module, datamodule=data)
        states.append(module.student.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=1e-5, rtol=1e-5)
