# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Several teachers out of one network
#
# An ensemble answers better than its members, and costs as much as all of them. Two ways to have
# one for less: paths through a single teacher whose blocks are left out at random, and a tree whose
# branches share their first blocks. Run from the root of the repository; it takes about a minute.

# %%
import logging

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Trainer, seed_everything
from torch.utils.flop_counter import FlopCounterMode

from lightning_kd import PeerCohort, SubTeacher, Supervised
from lightning_kd.data import Digits
from lightning_kd.exchange import Hierarchical
from lightning_kd.losses import SoftTarget
from lightning_kd.models import Tree, pretrained, resnet8, resnet14
from lightning_kd.teachers import StochasticDepth

# %matplotlib inline
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)  # networks this small gain nothing from a second one
digits = Digits(batch_size=40, subset=200, crop_padding=1)


def fit(module, epochs):
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=digits)


def options(epochs):
    return {
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4),
        "scheduler": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=epochs),
    }


# %% [markdown]
# ## Paths through one teacher
#
# This ResNet-20 was trained with blocks left out (`configs/digits/stochastic_teacher.yaml`). What
# several paths have in common runs once, so that eight paths cost less than eight teachers: here
# each is as likely as in training, and every block counts.

# %%
teacher = pretrained("configs/digits/teachers/stochastic_resnet20.safetensors")


@torch.no_grad()
def blocks_run(count, seeds=50):
    """Mean share of the blocks that run for so many paths, of those that as many teachers run."""
    source = StochasticDepth(count, survival=0.8)
    source.prepare(teacher, torch.zeros(1, 1, 8, 8))
    rows = []
    blocks = dict(teacher.named_modules())
    handles = [
        blocks[name].conv1.register_forward_hook(lambda m, x, y: rows.append(len(y)))
        for name in source.names
    ]
    for seed in range(seeds):
        with source.on(source.draw(count, seed)):
            teacher(torch.zeros(1, 1, 8, 8))
    for handle in handles:
        handle.remove()
    return sum(rows) / (seeds * count * len(source.names))


counts = range(1, 17)
figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
axes.plot(counts, [100 * blocks_run(m) for m in counts], marker="o")
axes.axhline(100, color="grey", linestyle=":", label="as many teachers")
axes.set(xlabel="paths", ylabel="blocks that run, %", ylim=(0, 105))
axes.legend()
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# A student learns from four of them as from any four teachers.

# %%
seed_everything(0, verbose=False)
student = resnet8(num_classes=10, in_channels=1, width=4)
fit(SubTeacher(student, teacher, StochasticDepth(4, survival=0.8), **options(40)), 40)
(scores,) = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).test(
    Supervised(student), datamodule=digits, verbose=False
)
print(f"student: {scores['test/accuracy']:.1%} of the test digits")

# %% [markdown]
# ## A tree of eight networks
#
# A ResNet-14 branches three times: one stem, two first stages, four second ones, eight third ones.
# Every leaf learns from the labels, and the mean of all eight teaches the means of the first one,
# two and four; beside it, eight networks trained by themselves.

# %%
EPOCHS = 60


def train_tree(seed):
    seed_everything(seed, verbose=False)
    tree = Tree(resnet14(num_classes=10, in_channels=1, width=4), ["bn1", "layer1", "layer2"])
    cohort = PeerCohort(
        [tree],
        Hierarchical(leaf_weight=0.25),
        [SoftTarget(2.0, weight=0.5)],
        task_weight=0.25,
        **options(EPOCHS),
    )
    fit(cohort, EPOCHS)
    return tree.eval()


def train_alone(seed):
    """Eight networks side by side: a cohort that teaches nothing."""
    seed_everything(seed, verbose=False)
    networks = [resnet14(num_classes=10, in_channels=1, width=4) for _ in range(8)]
    fit(PeerCohort(networks, losses=[], **options(EPOCHS)), EPOCHS)
    return [network.eval() for network in networks]


seeds = range(2)
trees = [train_tree(seed) for seed in seeds]
alone = [train_alone(seed) for seed in seeds]

# %% [markdown]
# ## Accuracy and cost
#
# `tree(x, num_models=n)` runs what the first n leaves need and no more; `tree.leaves(x)` yields
# them one by one, so that a program may stop when its time is up.

# %%
digits.setup("test")
images, labels = digits.on_after_batch_transfer(digits._test, 0)


def multiply_adds(answer):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        answer(images[:1])
    return counter.get_total_flops() / 2e6


@torch.no_grad()
def accuracies(leaves):
    """Of the mean of the first leaf, of two, and so on."""
    means = torch.stack(list(leaves)).cumsum(0)
    return 100 * (means.argmax(2) == labels).float().mean(1)


grown = torch.stack([accuracies(tree.leaves(images)) for tree in trees])
apart = torch.stack([accuracies(n(images) for n in networks) for networks in alone])
cost_of_tree = [multiply_adds(lambda x, n=n: trees[0](x, num_models=n)) for n in range(1, 9)]
cost_of_one = multiply_adds(alone[0][0])

figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
axes.plot(cost_of_tree, grown.mean(0), marker="o", label="tree")
axes.plot([n * cost_of_one for n in range(1, 9)], apart.mean(0), marker="s", label="independent")
for n in (1, 2, 4, 8):
    for x, y in (
        (cost_of_tree[n - 1], grown.mean(0)[n - 1]),
        (n * cost_of_one, apart.mean(0)[n - 1]),
    ):
        axes.annotate(f"{n}", (x, y), xytext=(3, 5), textcoords="offset points", fontsize=8)
axes.set(xlabel="million multiply-adds an image", ylabel="test accuracy, %", xscale="log")
axes.legend()
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# The first leaf, and the first two, know more than one and two networks that were trained alone,
# and two leaves cost little more than one. With more members the order turns: networks that share
# nothing differ more, which is what an ensemble lives on.
#
# With a budget: take leaves until it is spent.

# %%
budget = 0.25  # million multiply-adds
taken = [
    leaf for leaf, cost in zip(trees[0].leaves(images), cost_of_tree, strict=True) if cost <= budget
]
right = (torch.stack(taken).mean(0).argmax(1) == labels).float().mean()
print(f"{len(taken)} leaves for {cost_of_tree[len(taken) - 1]:.2f} million: {right:.1%}")
