import pytest
from lightning.pytorch import Callback

from lightning_kd import schedules
from lightning_kd.callbacks import AttributeScheduler, LossWeightScheduler, TemperatureScheduler
from lightning_kd.losses import SoftTarget
from tests import reference


class Notes(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        loss = pl_module.distillation.losses["soft_target"]
        self.values.append((loss.temperature, loss.weight, pl_module.distillation.task_weight))


def test_curves_start_and_end_where_they_say():
    for kind in (schedules.Linear, schedules.Cosine, schedules.Exponential):
        curve = kind(8.0, 2.0, 10)
        assert [curve(0), curve(10), curve(99)] == pytest.approx([8.0, 2.0, 2.0])
        values = [curve(i) for i in range(11)]
        assert values == sorted(values, reverse=True)
    assert schedules.Linear(8, 2, 10)(5) == 5
    assert schedules.Cosine(8, 2, 10)(5) == pytest.approx(5)
    assert schedules.Exponential(8, 2, 10)(5) == pytest.approx(4)
    ramp = schedules.SigmoidRampUp(0.0, 2.0, 80)
    for epoch in (0, 17, 80):
        assert ramp(epoch) == pytest.approx(2 * reference.sigmoid_ramp_up(epoch / 80))


def test_several_schedulers_drive_their_own_number(make_module, make_trainer, digits):
    notes = Notes()
    callbacks = [
        TemperatureScheduler(schedules.Linear(8, 4, 8), interval="step"),
        LossWeightScheduler(schedules.Linear(0, 1, 2)),
        LossWeightScheduler(schedules.Linear(1, 0, 2), loss="task"),
        notes,
    ]
    trainer = make_trainer(max_epochs=3, callbacks=callbacks)
    trainer.fit(make_module(), datamodule=digits())
    assert [t for t, _, _ in notes.values] == [max(8 - i / 2, 4) for i in range(12)]
    assert [w for _, w, _ in notes.values] == [0] * 4 + [0.5] * 4 + [1] * 4
    assert [w for _, _, w in notes.values] == [1] * 4 + [0.5] * 4 + [0] * 4
    assert len({c.state_key for c in callbacks[:3]}) == 3
    assert trainer.callback_metrics["schedule/losses.soft_target.temperature"] > 0


def test_two_schedulers_of_one_number_are_reported(make_module, make_trainer, digits):
    twice = [
        TemperatureScheduler(schedules.Linear(8, 4, 8)),
        AttributeScheduler("losses.soft_target.temperature", schedules.Linear(1, 2, 3)),
    ]
    with pytest.raises(ValueError, match="one scheduler of losses"):
        make_trainer(callbacks=twice).fit(make_module(), datamodule=digits())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "losses.soft_targets.temperature",
            "no 'soft_targets' in ModuleDict; near names: soft_target",
        ),
        ("losses.soft_target.temprature", "near names: .*temperature"),
        ("student", "a number at 'student', got TinyNet"),
        ("losses.soft_target.temperature_squared", "got bool"),
    ],
)
def test_a_target_that_is_no_number_is_reported(target, message, make_module, make_trainer, digits):
    callback = AttributeScheduler(target, schedules.Linear(1, 2, 3))
    with pytest.raises(ValueError, match=message):
        make_trainer(callbacks=[callback]).fit(make_module(), datamodule=digits())


def test_a_temperature_that_reaches_zero_is_reported(make_module, make_trainer, digits):
    callback = TemperatureScheduler(schedules.Linear(1, 0, 1))
    module = make_module(losses=[SoftTarget()])
    with pytest.raises(ValueError, match="stays > 0, got 0"):
        make_trainer(max_epochs=3, callbacks=[callback]).fit(module, datamodule=digits())


def test_bad_schedules_are_reported():
    with pytest.raises(ValueError, match="duration > 0"):
        schedules.Linear(1, 2, 0)
    with pytest.raises(ValueError, match="one sign"):
        schedules.Exponential(1, 0, 5)
    with pytest.raises(ValueError, match='"epoch" or "step"'):
        TemperatureScheduler(schedules.Linear(1, 2, 3), interval="batch")
