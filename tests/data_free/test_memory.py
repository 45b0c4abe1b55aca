import copy
import io

import pytest
import torch

from lightning_kd.data_free.replay import Memory, Prioritized, ReplayBatch, Uniform
from lightning_kd.data_free.replay.memory import images_to_bytes

CLASSES = 5


def make(capacity=8, sampler=None, evict="oldest", classes=CLASSES):
    return Memory(capacity, sampler or Uniform(), evict, classes, torch.device("cpu"))


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(first, count):
    """Images whose colour is their number, with random answers and priorities."""
    images = (torch.arange(first, first + count) / 255.0)[:, None, None, None].expand(-1, 1, 2, 2)
    return images, torch.randn(count, CLASSES), torch.rand(count)


def numbers(memory):
    """Numbers of remembered images, place by place."""
    return memory.images[: len(memory), 0, 0, 0].tolist()


def fill(memory, *counts):
    """Insert batches of these sizes; the logits and priorities by number of image."""
    said, priorities, first = [], [], 0
    for count in counts:
        images, logits, priority = numbered(first, count)
        memory.extend(images, logits, priority)
        said.append(logits)
        priorities.append(priority)
        first += count
    return torch.cat(said), torch.cat(priorities)


def assert_rows_belong_together(memory, said, priorities):
    for place, number in enumerate(numbers(memory)):
        assert torch.equal(memory.logits[place], said[number])
        assert memory.priorities[place] == priorities[number]


def assert_counts_are_those_of_the_contents(memory):
    slow = [0] * len(memory.counts)
    for row in memory.logits[: len(memory)].tolist():
        slow[row.index(max(row))] += 1
    assert memory.counts.tolist() == slow


# ---------------------------------------------------------------------- bytes


def test_every_byte_comes_back():
    values = torch.arange(256, dtype=torch.uint8)
    for back in (values.float() / 255, values.float().div_(255), values.double() / 255):
        assert torch.equal(images_to_bytes(back), values)


def test_bytes_are_rounded_not_cut():
    images = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 1.4 / 255, 254.6 / 255, 1.0, -0.3, 1.7])
    assert images_to_bytes(images).tolist() == [0, 0, 1, 1, 255, 255, 0, 255]


def test_images_come_back_within_half_a_byte():
    memory = make(6)
    images = torch.rand(6, 3, 4, 4)
    memory.extend(images, torch.randn(6, CLASSES), torch.rand(6))
    drawn = memory.sample(50, draws())
    assert drawn.images.dtype == torch.float32
    assert (drawn.images - images[drawn.indices]).abs().max() <= 0.5 / 255 + 1e-6
    again = images_to_bytes(drawn.images)
    assert torch.equal(again, memory.images[drawn.indices])


def test_images_are_not_changed_by_being_remembered():
    images = torch.rand(3, 1, 2, 2)
    before = images.clone()
    make().extend(images, torch.randn(3, CLASSES), torch.rand(3))
    assert torch.equal(images, before)


# ---------------------------------------------------------------------- who is in it


def test_a_batch_wraps_around():
    memory = make(5)
    said, priorities = fill(memory, 3, 4)
    assert len(memory) == 5
    assert sorted(numbers(memory)) == [2, 3, 4, 5, 6]
    assert_rows_belong_together(memory, said, priorities)


@pytest.mark.parametrize("evict", ["oldest", "lowest_priority"])
def test_a_batch_larger_than_the_memory_is_refused(evict):
    memory = make(4, evict=evict)
    with pytest.raises(ValueError, match=r"at most 4 images.*got 5"):
        memory.extend(*numbered(0, 5))
    assert len(memory) == 0
    memory.extend(*numbered(0, 4))
    assert sorted(numbers(memory)) == [0, 1, 2, 3]


@pytest.mark.parametrize("evict", ["oldest", "lowest_priority"])
def test_a_batch_as_large_as_the_memory_replaces_all(evict):
    memory = make(4, evict=evict)
    said, priorities = fill(memory, 3, 4, 4)
    assert sorted(numbers(memory)) == [7, 8, 9, 10]
    assert_rows_belong_together(memory, said, priorities)


@pytest.mark.parametrize("seed", range(10))
def test_the_oldest_goes_first(seed):
    random = draws(seed)
    capacity = int(torch.randint(3, 12, (), generator=random))
    sizes = torch.randint(1, capacity, (12,), generator=random).tolist()
    memory, said, total = make(capacity), [], 0
    for size in sizes:
        memory.extend(*(batch := numbered(total, size)))
        said.append(batch[1])
        total += size
        assert sorted(numbers(memory)) == list(range(max(0, total - capacity), total))
        assert_counts_are_those_of_the_contents(memory)


def test_the_oldest_goes_first_after_a_batch_as_large_as_the_memory():
    """Within a batch the first image is the oldest."""
    memory = make(4)
    fill(memory, 1, 4)
    assert sorted(numbers(memory)) == [1, 2, 3, 4]
    memory.extend(*numbered(5, 1))
    assert sorted(numbers(memory)) == [2, 3, 4, 5]


@pytest.mark.parametrize("seed", range(10))
def test_the_lowest_priority_goes_first(seed):
    random = draws(seed)
    capacity = int(torch.randint(3, 12, (), generator=random))
    sizes = torch.randint(1, capacity + 1, (12,), generator=random).tolist()
    memory, kept, total = make(capacity, evict="lowest_priority"), [], 0
    for size in sizes:
        images, logits, priorities = numbered(total, size)
        memory.extend(images, logits, priorities)
        room = capacity - size  # newcomers always come in
        kept = sorted(kept, reverse=True)[:room]
        kept += [(float(p), total + k) for k, p in enumerate(priorities)]
        total += size
        assert sorted(numbers(memory)) == sorted(n for _, n in kept)
        assert_counts_are_those_of_the_contents(memory)


def test_renewed_priorities_decide_who_goes():
    memory = make(3, Prioritized(), "lowest_priority")
    images, logits, _ = numbered(0, 3)
    memory.extend(images, logits, torch.tensor([3.0, 2.0, 1.0]))
    memory.update_priorities(
        ReplayBatch(torch.tensor([0]), images[:1], logits[:1], torch.ones(1)), torch.tensor([0.5])
    )
    memory.extend(*numbered(3, 1))
    assert sorted(numbers(memory)) == [1, 2, 3]


def test_without_capacity_all_are_kept():
    memory = make(None)
    said, priorities = fill(memory, 1, 2, 30, 1, 7, 50)
    assert numbers(memory) == list(range(91))
    assert_rows_belong_together(memory, said, priorities)


@pytest.mark.parametrize("capacity", [1, 6, 7, None])
@pytest.mark.parametrize("evict", ["oldest", "lowest_priority"])
@pytest.mark.parametrize("seed", range(3))
def test_the_class_histogram_is_that_of_the_contents(capacity, evict, seed):
    random, memory, total = draws(seed), make(capacity, evict=evict), 0
    said, priorities = [], []
    for _ in range(15):
        size = int(torch.randint(1, (capacity or 9) + 1, (), generator=random))
        batch = numbered(total, size)
        memory.extend(*batch)
        said.append(batch[1])
        priorities.append(batch[2])
        total += size
        assert len(memory) == min(total, capacity or total)
        assert len(set(numbers(memory))) == len(memory)
        assert_counts_are_those_of_the_contents(memory)
        assert_rows_belong_together(memory, torch.cat(said), torch.cat(priorities))


def test_the_class_histogram_survives_answers_that_nearly_tie():
    """Classes that differ in float64 alone tie once remembered; they are counted as such."""
    memory = make(2, classes=3)
    for number in range(4):
        logits = torch.tensor([[1.0, 1.0 + 1e-12, 0.0]] * 2, dtype=torch.float64)
        memory.extend(numbered(2 * number, 2)[0], logits, torch.rand(2))
        assert (memory.counts >= 0).all()
        assert_counts_are_those_of_the_contents(memory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_answers_are_remembered_exactly(dtype):
    memory = make(3)
    images, logits, priorities = numbered(0, 3)
    memory.extend(images, logits.to(dtype), priorities.to(dtype))
    assert memory.logits.dtype == memory.priorities.dtype == torch.float32
    assert torch.equal(memory.logits, logits.to(dtype).float())
    assert_counts_are_those_of_the_contents(memory)


# ---------------------------------------------------------------------- draws


def test_an_empty_memory_cannot_be_drawn_from():
    with pytest.raises(ValueError, match="extend it first"):
        make().sample(3, draws())


@pytest.mark.parametrize("sampler", [Uniform(), Prioritized()])
def test_only_what_is_remembered_is_drawn(sampler):
    memory = make(100, sampler)
    said, _ = fill(memory, 3)
    drawn = memory.sample(400, draws())
    assert set(drawn.indices.tolist()) == {0, 1, 2}
    assert drawn.images.shape == (400, 1, 2, 2)
    assert torch.equal(drawn.images.mul(255).round()[:, 0, 0, 0].long(), drawn.indices)
    assert torch.equal(drawn.logits, said[drawn.indices])
    assert drawn.weights.shape == (400,)


def test_the_draws_do_not_change_the_memory():
    memory = make(4)
    fill(memory, 4)
    before = memory.images.clone()
    memory.sample(4, draws()).images.zero_()
    assert torch.equal(memory.images, before)


def test_update_writes_weighted_divergences_where_it_drew():
    memory = make(50, Prioritized(0.9, 0.5))
    _, before = fill(memory, 50)
    drawn = memory.sample(20, draws())
    divergences = (torch.rand(50) * 3)[drawn.indices]
    memory.update_priorities(drawn, divergences)
    assert 0 < len(set(drawn.indices.tolist())) < 50
    for place in range(50):
        if place in drawn.indices.tolist():
            k = drawn.indices.tolist().index(place)
            assert memory.priorities[place] == drawn.weights[k] * divergences[k]
        else:
            assert memory.priorities[place] == before[place]


def test_update_keeps_no_graph():
    memory = make(4, Prioritized())
    fill(memory, 4)
    drawn = memory.sample(3, draws())
    memory.update_priorities(drawn, torch.ones(3, requires_grad=True).detach())
    assert not memory.priorities.requires_grad


def test_uniform_draws_leave_priorities_alone():
    memory = make(5)
    _, before = fill(memory, 5)
    memory.update_priorities(memory.sample(4, draws()), torch.full((4,), 9.0))
    assert torch.equal(memory.priorities, before)


def test_priorities_settle_in_a_memory_as_the_formula_says():
    """P ~ KL^(alpha / (1 + alpha beta)), by draws and updates of nearly all images at once."""
    alpha, beta = 1.0, 0.4
    memory = make(6, Prioritized(alpha, beta, normalize="none"))
    fill(memory, 6)
    divergences, random = torch.tensor([0.2, 0.5, 0.8, 1.0, 1.5, 3.0]), draws()
    for _ in range(60):
        drawn = memory.sample(400, random)
        memory.update_priorities(drawn, divergences[drawn.indices])
    found = memory.priorities + 1e-6
    wanted = divergences ** (alpha / (1 + alpha * beta))
    torch.testing.assert_close(found / found.sum(), wanted / wanted.sum(), rtol=1e-4, atol=0)


# ---------------------------------------------------------------------- checkpoints


def live(memory, rounds, seed, first=0):
    """Rounds of inserting, drawing and updating; all that was drawn."""
    random, data, seen = draws(seed), draws(seed + 1), []
    for _ in range(rounds):
        size = 3
        images = torch.rand(size, 1, 2, 2, generator=data)
        memory.extend(
            images,
            torch.randn(size, CLASSES, generator=data),
            torch.rand(size, generator=data),
        )
        drawn = memory.sample(5, random)
        seen.append(drawn)
        memory.update_priorities(drawn, torch.rand(5, generator=data))
    return seen


def assert_same_contents(a, b):
    assert len(a) == len(b)
    assert a.position == b.position
    assert torch.equal(a.counts, b.counts)
    for name in ("images", "logits", "priorities"):
        assert torch.equal(getattr(a, name)[: len(a)], getattr(b, name)[: len(b)]), name


@pytest.mark.parametrize("capacity", [4, 10, None])
@pytest.mark.parametrize("evict", ["oldest", "lowest_priority"])
@pytest.mark.parametrize("sampler", [Uniform(), Prioritized()])
@pytest.mark.parametrize("rounds", [1, 3, 4])
def test_a_restored_memory_goes_on_identically(capacity, evict, sampler, rounds):
    memory = make(capacity, sampler, evict)
    live(memory, rounds, 1)
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    restored = make(capacity, sampler, evict)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert_same_contents(memory, restored)
    for one, other in zip(live(memory, 6, 7), live(restored, 6, 7), strict=True):
        for name in ("indices", "images", "logits", "weights"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert_same_contents(memory, restored)


def test_a_restored_memory_shares_nothing_with_the_checkpoint():
    memory = make(6, Prioritized())
    live(memory, 3, 1)
    state = copy.deepcopy(memory.state_dict())
    kept = copy.deepcopy(state)
    restored = make(6, Prioritized())
    restored.load_state_dict(state)
    live(restored, 3, 2)
    for name in ("images", "logits", "priorities"):
        assert torch.equal(state[name], kept[name])


def test_restoring_replaces_what_was_there():
    memory, other = make(6), make(6)
    live(memory, 1, 1)
    live(other, 4, 2)
    other.load_state_dict(memory.state_dict())
    assert_same_contents(memory, other)
    assert_counts_are_those_of_the_contents(other)


def test_several_memories_become_one():
    memories = [make(4), make(4)]
    for seed, memory in enumerate(memories):
        live(memory, 2, seed)
    states = [memory.state_dict() for memory in memories]
    joined = {
        name: torch.cat([state[name] for state in states])
        for name in ("images", "logits", "priorities")
    }
    whole = make(8)
    whole.load_state_dict(joined)
    assert len(whole) == 8
    assert torch.equal(whole.counts, sum(memory.counts for memory in memories))


def test_too_large_a_checkpoint_is_refused():
    memory = make(6)
    fill(memory, 6)
    with pytest.raises(ValueError, match=r"at most 5 remembered images.*got 6.*set capacity"):
        make(5).load_state_dict(memory.state_dict())


def test_the_oldest_goes_first_after_the_capacity_was_raised():
    memory = make(4)
    fill(memory, 3, 3)
    larger = make(6)
    larger.load_state_dict(memory.state_dict())
    larger.extend(*numbered(6, 2))
    assert sorted(numbers(larger)) == [2, 3, 4, 5, 6, 7]
    larger.extend(*numbered(8, 3))
    assert sorted(numbers(larger)) == [5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("capacity", [4, None])
def test_an_empty_memory_can_be_restored(capacity):
    restored = make(capacity)
    restored.load_state_dict(make(capacity).state_dict())
    assert len(restored) == 0
    fill(restored, 3)
    assert numbers(restored) == [0, 1, 2]
