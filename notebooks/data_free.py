# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # A student that never sees an image
#
# The teacher knows handwritten digits; its training images are gone. A generator is trained against
# it, a memory keeps what the generator makes, and a student learns from the memory (SSD-KD). Run
# from the root of the repository; it takes about a minute.

# %%
import logging

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_kd import DataFree
from lightning_kd.callbacks import ReplayBuffer
from lightning_kd.data import Digits, Rounds
from lightning_kd.data_free.generators import MetaGenerator
from lightning_kd.data_free.image_losses import Adversarial, BatchNormStatistics, OneHot
from lightning_kd.data_free.replay import Prioritized
from lightning_kd.models import ImageGenerator, pretrained, resnet8

# %matplotlib inline
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)  # networks this small gain nothing from a second one
seed_everything(0, verbose=False)

# %% [markdown]
# ## One round a training step: synthesize, remember, distil
#
# What images are to be like is a list of image losses. The memory of 1,000 images is the data
# scale. The digits themselves are only used to measure.

# %%
teacher = pretrained("configs/digits/teachers/resnet20.safetensors")
module = DataFree(
    student=resnet8(num_classes=10, in_channels=1, width=4),
    teacher=teacher,
    generator=MetaGenerator(ImageGenerator((1, 8, 8), latent=32, width=16)),
    image_losses=[
        BatchNormStatistics(1.0),
        OneHot(0.5, modulate=True),
        Adversarial(1.0, masked=True),
    ],
    temperature=4.0,
    round_images=128,
    generator_steps=5,
    student_steps=25,
    batch_size=64,
    warm_up=6,
    scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=12),
)


class History(Callback):
    """Validation results and a few images, epoch by epoch."""

    def __init__(self):
        self.rows, self.images = [], []

    def on_validation_end(self, trainer, module):
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        self.images.append(module.synthesizer.latest[:10].clone())


history, buffer = History(), ReplayBuffer(1000, Prioritized())
trainer = Trainer(
    max_epochs=12,
    accelerator="cpu",
    logger=False,
    num_sanity_val_steps=0,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[history, buffer],
)
trainer.fit(module, datamodule=Rounds(10, measure=Digits()))

# %% [markdown]
# ## What the student knows after each epoch

# %%
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
for key, label in (("val/accuracy", "student"), ("val/teacher_0/accuracy", "teacher")):
    axes.plot(range(1, 13), [100 * row[key] for row in history.rows], marker=".", label=label)
axes.set(xlabel="epoch", ylabel="real digits recognised, %", ylim=(0, 101))
axes.legend()
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## What it learned from
#
# Images of three epochs, with the class that the teacher sees in them.

# %%
figure, grid = plt.subplots(3, 10, figsize=(9, 3.2), layout="constrained")
for row, epoch in enumerate((0, 5, 11)):
    images = history.images[epoch]
    with torch.no_grad():
        seen = teacher(images).argmax(1)
    for axes, image, label in zip(grid[row], images, seen, strict=True):
        axes.imshow(image[0], cmap="gray")
        axes.set_title(int(label), fontsize=8)
        axes.axis("off")
plt.show()

# %% [markdown]
# ## What it finds hard
#
# Priorities of the remembered images: how far the student was from the teacher when it last saw
# them.

# %%
memory = buffer.memory
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
left.hist(memory.priorities[: len(memory)].numpy(), bins=40, color="C7")
left.set(xlabel="priority (weighted divergence, nats)", ylabel="images", yscale="log")
right.bar(range(10), memory.counts, color="C7")
right.set(xlabel="class", ylabel="remembered images", xticks=range(10))
plt.show()
(scores,) = trainer.test(module, datamodule=Rounds(10, measure=Digits()), verbose=False)
print(f"student: {scores['test/accuracy']:.1%} of the real test digits, none of which it ever saw")
