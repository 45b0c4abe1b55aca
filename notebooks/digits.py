# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Three teachers and a small student
#
# 1,797 real scans of handwritten digits, 8 x 8 pixels. Three small networks were trained on them; a
# student with a tenth of their parameters learns from all three. Run from the root of the
# repository; it takes about a minute.

# %%
import tempfile

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Trainer, seed_everything
from torchmetrics.functional.classification import multiclass_confusion_matrix

from lightning_kd import MultiTeacher
from lightning_kd.callbacks import DistillationReport, TemperatureScheduler
from lightning_kd.data import Digits
from lightning_kd.losses import SoftTarget
from lightning_kd.models import pretrained, resnet8
from lightning_kd.schedules import Cosine

# %matplotlib inline
torch.set_num_threads(1)  # networks this small gain nothing from a second one
seed_everything(0, verbose=False)

# %% [markdown]
# ## Teachers
#
# `pretrained` reads safetensors, state dicts and checkpoints, and never unpickles anything.

# %%
names = ["resnet14", "resnet20", "wide_resnet"]
teachers = [pretrained(f"configs/digits/teachers/{name}.safetensors") for name in names]

# %% [markdown]
# ## Distil
#
# The module is an ordinary LightningModule: give it live networks and a Trainer. The temperature
# falls from 8 to 2 while the student learns.

# %%
module = MultiTeacher(
    student=resnet8(num_classes=10, in_channels=1, width=4),
    teachers=teachers,
    losses=[SoftTarget(temperature=8.0, weight=0.9)],
    task_weight=0.1,
)
digits = Digits(batch_size=64, crop_padding=1)
folder = tempfile.mkdtemp()
report = DistillationReport(folder=folder, plot=False)
trainer = Trainer(
    max_epochs=20,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[report, TemperatureScheduler(Cosine(8.0, 2.0, 20))],
)
trainer.fit(module, datamodule=digits)

# %% [markdown]
# ## Curves

# %%
epochs = [row["epoch"] + 1 for row in report.history]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for key in ("train/task", "train/soft_target"):
    left.plot(epochs, [row[key] for row in report.history], label=key)
left.set(xlabel="epoch", ylabel="weighted loss")
for key in ("val/accuracy", "val/agreement"):
    right.plot(epochs, [100 * row[key] for row in report.history], label=key)
right.axhline(
    100 * report.history[-1]["val/ensemble/accuracy"], color="black", ls="--", label="ensemble"
)
right.set(xlabel="epoch", ylabel="validation, %")
for axes in (left, right):
    axes.legend()
    axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## What the student confuses
#
# Measured on the test images, which nothing above has touched.

# %%
trainer.test(module, datamodule=digits, verbose=False)
images, labels = digits.on_after_batch_transfer(digits._test, 0)
with torch.no_grad():
    predictions = module.eval()(images).argmax(1)
confusion = multiclass_confusion_matrix(predictions, labels, num_classes=10)
figure, axes = plt.subplots(figsize=(4.2, 4), layout="constrained")
axes.imshow(confusion, cmap="Blues")
for row in range(10):
    for column in range(10):
        if confusion[row, column]:
            colour = "white" if row == column else "firebrick"
            axes.text(
                column, row, int(confusion[row, column]), ha="center", va="center", color=colour
            )
axes.set(xlabel="predicted", ylabel="true", xticks=range(10), yticks=range(10))
plt.show()
accuracy = (predictions == labels).float().mean()
print(f"student: {accuracy:.1%} of {len(labels)} test digits")
