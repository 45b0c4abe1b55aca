from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from torchvision.io import write_png
from torchvision.transforms.v2 import functional as image_ops

from lightning_kd.data import CIFAR10, MNIST, Digits, FashionMNIST, ImageFolder
from lightning_kd.data.batches import Batches, Order
from lightning_kd.functional import crop_and_flip


def test_digits_are_scikit_learns_scans_and_the_splits_are_disjoint():
    from sklearn.datasets import load_digits

    data = Digits(val_split=0.1)
    data.setup("fit")
    data.setup("test")
    sizes = [len(part[1]) for part in (data._train, data._val, data._test)]
    assert sizes == [1294, 144, 359]
    rows = torch.cat([part[0] for part in (data._train, data._val, data._test)]).flatten(1)
    scans = torch.tensor(load_digits().data / 16 * 255).round().to(torch.uint8)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, scans.tolist()))


def test_batches_reach_the_module_in_zero_to_one():
    data = Digits(batch_size=10)
    data.setup("fit")
    images, labels = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert images.shape == (10, 1, 8, 8)
    assert images.dtype == torch.float32
    assert images.min() == 0
    assert images.max() == 1
    assert labels.dtype == torch.int64


def collect(loader):
    return [batch[1].tolist() for batch in loader]


def test_shuffle_depends_on_seed_and_epoch_alone():
    data = Digits(batch_size=100)
    data.shuffle_seed = 3
    data.setup("fit")
    loader = data.train_dataloader()
    first = collect(loader)
    torch.rand(5)
    assert collect(loader) == first
    loader.sampler.set_epoch(1)
    assert collect(loader) != first
    assert sorted(chain(*collect(loader))) == sorted(chain(*first))


def test_loader_continues_in_the_middle_of_an_epoch():
    data = Digits(batch_size=100)
    data.setup("fit")
    loader = data.train_dataloader()
    whole = list(loader)
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    again = data.train_dataloader()
    again.load_state_dict(loader.state_dict())
    rest = list(again)
    assert len(rest) == len(whole) - 5
    for a, b in zip(rest, whole[5:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert len(collect(again)) == len(whole)


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("length", [32, 37, 35])
def test_two_ranks_together_see_what_one_rank_sees(length, drop_last):
    options = {"length": length, "shuffle": True, "drop_last": drop_last}
    one = [(i.tolist(), d) for i, d in Order(batch_size=8, **options).batches()]
    ranks = [list(Order(batch_size=4, rank=r, world_size=2, **options).batches()) for r in (0, 1)]
    assert len(ranks[0]) == len(ranks[1])
    for (indices, draws), (a, b), (c, d) in zip(one, *ranks, strict=False):
        even = len(indices) // 2 * 2
        assert a.tolist() + c.tolist() == indices[:even]
        assert torch.equal(torch.cat([b, d]), draws[:even])


def test_evaluation_shards_cover_every_sample_once():
    shards = [Order(11, 3, False, rank=r, world_size=2) for r in (0, 1)]
    seen = [i for s in shards for batch, _ in s.batches() for i in batch.tolist()]
    assert sorted(seen) == list(range(11))
    assert [len(s) for s in shards] == [2, 2]


def test_each_image_has_its_own_crop_and_flip():
    images = torch.rand(64, 3, 6, 7)
    draws = torch.rand(64, 3)
    got = crop_and_flip(images, draws, 2, True)
    for image, (u, v, w), out in zip(images, draws, got, strict=True):
        row, column = int(u * 5), int(v * 5)
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        right = padded[:, row : row + 6, column : column + 7]
        right = image_ops.horizontal_flip(right) if w < 0.5 else right
        assert torch.equal(out, right)
    assert torch.equal(crop_and_flip(images, torch.ones(64, 3), 0, True), images)


def test_labelled_fraction_keeps_a_share_of_each_class():
    data = Digits(labelled_fraction=0.1)
    full = Digits()
    data.setup("fit")
    full.setup("fit")
    known = data._train[1] >= 0
    assert torch.equal(data._train[1][known], full._train[1][known])
    counts, total = data._train[1][known].bincount(), full._train[1].bincount()
    assert torch.equal(counts, (total * 0.1).round().long())
    assert (data._val[1] >= 0).all()
    few = Digits(labelled_fraction=0.1, keep_unlabelled=False)
    few.setup("fit")
    assert torch.equal(few._train[1], data._train[1][known])
    assert (Digits(labelled_fraction=0.0)._hide(full._train[1]) == -1).all()


def test_subset_counts_and_fractions():
    for subset, size in ((100, 100), (0.5, 647), (1.0, 1294)):
        data = Digits(subset=subset)
        data.setup("fit")
        assert len(data._train[1]) == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"val_split": -1}, "val_split >= 0"),
        ({"subset": 0}, "subset > 0"),
        ({"labelled_fraction": 1.5}, "labelled_fraction from 0 to 1"),
    ],
)
def test_bad_options_are_reported(options, message):
    with pytest.raises(ValueError, match=message):
        Digits(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_split": 1438}, "leave images to train on"),
        ({"subset": 5000}, "at most"),
        ({"labelled_fraction": 0.0, "keep_unlabelled": False}, "got none"),
        ({"subset": 5, "drop_last": True}, "at least one batch"),
    ],
)
def test_empty_data_is_reported(options, message):
    data = Digits(**options)

    def start():
        data.setup("fit")
        data.train_dataloader()

    with pytest.raises(ValueError, match=message):
        start()


@pytest.mark.parametrize("rank", range(4))
def test_every_rank_is_told_of_fewer_images_than_ranks(rank):
    strategy = SimpleNamespace(broadcast=lambda value: value)
    data = Digits(subset=3, val_split=3)
    share = {"num_replicas": 4, "rank": rank}
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=share, strategy=strategy)
    data.setup("fit")
    for loader in (data.train_dataloader, data.val_dataloader):
        with pytest.raises(ValueError, match="each of 4 processes, got 3 images"):
            loader()


def test_labels_out_of_range_are_reported():
    class Wrong(Digits):
        num_classes = 9

    with pytest.raises(ValueError, match=r"from 0 to 8.*got 0 to 9"):
        Wrong().setup("fit")


@pytest.mark.parametrize("kind", [MNIST, FashionMNIST, CIFAR10])
def test_data_that_is_not_there_says_where_it_looked(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_KD_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}.*--data.root"):
        kind(download=False).setup("fit")


def test_mnist_in_torchvisions_layout(tmp_path):
    """Official files in miniature: the idx format of 3 images, written by hand."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8)
    for name in ("train", "t10k"):
        header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (3, 28, 28))
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        labels = bytes([0, 0, 8, 1]) + (3).to_bytes(4, "big") + bytes([4, 0, 9])
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(labels)
    data = MNIST(root=str(tmp_path), download=False)
    data.setup("test")
    assert torch.equal(data._test[0][:, 0], images)
    assert data._test[1].tolist() == [4, 0, 9]


@pytest.fixture
def folder(tmp_path):
    for index, name in enumerate(("cat", "dog")):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(6):
            image = torch.full((3, 20 + i, 30), 100 * index + i, dtype=torch.uint8)
            write_png(image, str(tmp_path / "train" / name / f"{i}.png"))
    write_png(torch.zeros(3, 9, 9, dtype=torch.uint8), str(tmp_path / "train" / "loose.png"))
    return tmp_path


@pytest.mark.parametrize(("workers", "channels"), [(0, 3), (1, 1)])
def test_image_folder_reads_classes_and_unlabelled_images(folder, workers, channels):
    data = ImageFolder(
        str(folder),
        image_size=16,
        channels=channels,
        num_workers=workers,
        val_split=0,
        batch_size=5,
    )
    data.setup("fit")
    assert (data.num_classes, data.image_shape) == (2, (channels, 16, 16))
    state = torch.get_rng_state()
    seen = [(x, y) for batch in data.train_dataloader() for x, y in zip(*batch[:2], strict=True)]
    assert torch.equal(state, torch.get_rng_state())
    assert sorted(y.item() for _, y in seen) == [-1] + [0] * 6 + [1] * 6
    for image, label in seen:
        assert image.shape == (channels, 16, 16)
        assert label < 0 or image.max() // 100 == label


def test_image_folder_says_what_is_missing(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="training images in"):
        ImageFolder(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="test"):
        ImageFolder(str(folder)).setup("test")
    (folder / "test" / "bird").mkdir(parents=True)
    write_png(torch.zeros(3, 9, 9, dtype=torch.uint8), str(folder / "test" / "bird" / "a.png"))
    with pytest.raises(ValueError, match="'bird'"):
        ImageFolder(str(folder)).setup("test")
    (tmp_path / "flat" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="class_names"):
        ImageFolder(str(tmp_path / "flat"))
    data = ImageFolder(str(tmp_path / "flat"), class_names=["a", "b"])
    with pytest.raises(ValueError, match="found none"):
        data.setup("fit")
    (folder / "train" / "cat" / "0.png").write_bytes(b"no image")
    data = ImageFolder(str(folder), image_size=8, num_workers=0, val_split=0)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"cat/0\.png"):
        list(data.train_dataloader())


def test_batches_keep_the_number_that_len_promises():
    order = Order(7, 2, True)
    loader = Batches(order, lambda plan: ((i, i) for i in plan), train=False)
    assert len(list(loader)) == len(loader) == 4


def test_an_expert_sees_some_classes_renumbered_in_its_order():
    whole, some = Digits(val_split=0.0), Digits(val_split=0.0, classes=[7, 2])
    whole.setup("fit")
    some.setup("fit")
    assert some.num_classes == 2
    images, labels = some._train
    for mine, original in ((0, 7), (1, 2)):
        wanted = whole._train[0][whole._train[1] == original]
        assert {i.numpy().tobytes() for i in images[labels == mine]} == {
            i.numpy().tobytes() for i in wanted
        }
    assert Digits(classes=None).num_classes == 10
    for wrong in ([], [1, 1], [10]):
        with pytest.raises(ValueError, match="Expected distinct classes from 0 to 9"):
            Digits(classes=wrong)
