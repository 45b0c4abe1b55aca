# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Networks that teach each other
#
# Deep mutual learning needs no teacher: untrained networks learn from the labels and from each
# other's answers. 200 labelled digits, three small networks; first each by itself, then as a
# cohort. Run from the root of the repository; it takes about a minute.

# %%
import logging

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_kd import PeerCohort
from lightning_kd.data import Digits
from lightning_kd.exchange import Mutual
from lightning_kd.losses import SoftTarget
from lightning_kd.models import resnet8

# %matplotlib inline
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)  # networks this small gain nothing from a second one
digits = Digits(batch_size=40, subset=200, crop_padding=1)

# %% [markdown]
# ## Alone, and together
#
# Without losses a cohort is a number of networks that train side by side. With them, each learns
# from the mean of the others' probabilities too. Equal seeds give equal weights and batches.


# %%
class History(Callback):
    """Validation results, epoch by epoch."""

    def __init__(self):
        self.rows = []

    def on_validation_end(self, trainer, module):
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def train(losses, seed):
    seed_everything(seed, verbose=False)
    module = PeerCohort(
        peers=[resnet8(num_classes=10, in_channels=1, width=w) for w in (4, 4, 8)],
        exchange=Mutual(),
        losses=losses,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=40),
    )
    history = History()
    trainer = Trainer(
        max_epochs=40,
        accelerator="cpu",
        logger=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[history],
    )
    trainer.fit(module, datamodule=digits)
    (scores,) = trainer.test(module, datamodule=digits, verbose=False)
    return module, history.rows, scores


seeds = range(3)
alone = [train([], seed) for seed in seeds]
together = [train([SoftTarget(temperature=1.0)], seed) for seed in seeds]

# %% [markdown]
# ## Curves
#
# Means over the seeds: what each peer knows, and how often two of them give the same answer.


# %%
def mean_of(runs, key):
    values = torch.tensor([[row[key] for row in history] for _, history, _ in runs])
    return 100 * values.mean(0)


figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for runs, style, name in ((alone, ":", "alone"), (together, "-", "together")):
    epochs = range(1, 41)
    for k in range(3):
        values = mean_of(runs, f"val/peer_{k}/accuracy")
        left.plot(epochs, values, style, color=f"C{k}", label=f"peer {k}, {name}")
    right.plot(epochs, mean_of(runs, "val/agreement_0_1"), style, color="black", label=name)
left.set(xlabel="epoch", ylabel="accuracy on val, %", ylim=(60, 101))
right.set(xlabel="epoch", ylabel="peers 0 and 1 agree, %", ylim=(60, 101))
for axes in (left, right):
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## On the test images
#
# Every peer, and the mean of their probabilities, three seeds each.

# %%
names = ["peer_0", "peer_1", "peer_2", "ensemble"]
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
for offset, (runs, colour, label) in enumerate(
    ((alone, "C7", "alone"), (together, "C0", "together"))
):
    for k, name in enumerate(names):
        values = [100 * scores[f"test/{name}/accuracy"] for _, _, scores in runs]
        axes.bar(
            k + 0.4 * offset,
            sum(values) / len(values),
            0.38,
            color=colour,
            alpha=0.6,
            label=label if k == 0 else None,
        )
        axes.plot([k + 0.4 * offset] * len(values), values, ".", color="black")
axes.set(ylabel="test accuracy, %", ylim=(85, 100), xticks=[k + 0.2 for k in range(4)])
axes.set_xticklabels(names)
axes.legend()
plt.show()

# %% [markdown]
# ## Keep one
#
# The best peer of the last cohort, as an ordinary network.

# %%
module, history, _ = together[-1]
best = module.distillation.best_network(module.distillation.scores(history[-1]))
network = module.exported_networks()[best].eval()
images, labels = digits.on_after_batch_transfer(digits._test, 0)
with torch.no_grad():
    accuracy = (network(images).argmax(1) == labels).float().mean()
print(f"{best}: {accuracy:.1%} of {len(labels)} test digits")
