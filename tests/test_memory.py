"""Queue and bank: against a deque and a loop, on two ranks, through a checkpoint, under DDP."""

from collections import deque

import pytest
import torch
from scipy.stats import chisquare
from torch import nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from conftest import close, on_ranks
from sslzoo import dist
from sslzoo.memory import Bank, Queue, memory_buffers
from sslzoo.views.draw import integers

# Queue


@pytest.mark.parametrize("size", [1, 7, 24])
def test_queue_is_a_deque_for_any_batch_sizes(size):
    queue, slow = Queue(size, 3), deque(maxlen=size)
    slow.extend(queue.keys)
    for batch in torch.randint(1, 2 * size + 3, (30,)).tolist():
        z = torch.randn(batch, 3)
        queue.push(z)
        slow.extend(z)
        oldest_first = queue.keys.roll(-int(queue.pointer), 0)
        assert torch.equal(oldest_first, torch.stack(list(slow)))


def test_queue_starts_with_random_directions():
    keys = Queue(200, 16).keys
    close(keys.norm(dim=1), torch.ones(200), rtol=1e-6)
    assert (keys @ keys.T - torch.eye(200)).abs().max() < 0.99


def test_pushing_leaves_a_pending_backward_its_old_keys():
    queue, q = Queue(6, 4).double(), torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    keys = queue.keys.clone()
    loss = (q @ queue.keys.T).exp().sum()
    queue.push(torch.randn(4, 4, dtype=torch.double, requires_grad=True))
    loss.backward()
    close(q.grad, (q.detach() @ keys.T).exp() @ keys)
    assert not queue.keys.requires_grad


def test_queue_keeps_its_own_precision():
    queue = Queue(6, 4)
    queue.push(torch.ones(2, 4, dtype=torch.bfloat16))
    assert queue.keys.dtype == torch.float32
    assert (queue.keys[:2] == 1).all()


@pytest.mark.parametrize("make", [lambda: Queue(8, 3), lambda: Bank(8, 3)])
def test_memory_goes_on_where_its_checkpoint_left_it(make):
    def visit(memory, seed):
        generator = torch.Generator().manual_seed(seed)
        index, z = torch.randperm(8, generator=generator)[:5], torch.randn(5, 3, generator=generator)
        if isinstance(memory, Queue):
            return memory.push(z)
        memory.update(index, z)
        return memory.sample(index, 20)

    unbroken, resumed = make(), make()
    visit(unbroken, 1)
    resumed.load_state_dict(unbroken.state_dict())
    drawn = [visit(memory, 2) for memory in (unbroken, resumed)]
    assert torch.equal(drawn[0], drawn[1]) if drawn[0] is not None else True
    for key, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


# Bank


def test_bank_rows_start_uniform_with_a_length_of_about_one():
    slots = Bank(2000, 12).slots
    bound = (3 / 12) ** 0.5
    assert slots.abs().max() <= bound
    assert slots.square().sum(1).mean().item() == pytest.approx(1, rel=0.02)
    counts = torch.histc(slots, 20, -bound, bound)
    assert chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_bank_update_is_a_normalised_moving_average_of_visited_rows_only(momentum):
    bank = Bank(9, 4, momentum).double()
    for index in ([3, 0, 8], [0, 5]):
        before, z = bank.slots.clone(), normalize(torch.randn(len(index), 4, dtype=torch.double), dim=1)
        bank.update(torch.tensor(index), z)
        for row in range(9):
            expected = before[row]
            if row in index:
                expected = momentum * before[row] + (1 - momentum) * z[index.index(row)]
                expected = expected / expected.square().sum().sqrt()
            close(bank.slots[row], expected)
    assert bank.updates == 2


def test_draw_gives_the_slots_of_sample_own_first_without_a_gradient():
    bank = Bank(9, 4)
    index = torch.tensor([4, 4, 7])
    rows, drawn = bank.sample(index, 5), bank.draw(index, 5)
    assert rows[:, 0].tolist() == [4, 4, 7]
    for b in range(3):
        for j in range(6):
            assert torch.equal(drawn[b, j], bank.slots[rows[b, j]])
    assert not drawn.requires_grad


def test_negatives_are_uniform_over_all_rows_and_new_after_each_update():
    bank = Bank(16, 4)
    index = torch.arange(16)
    drawn = []
    for _ in range(4):
        drawn.append(bank.sample(index, 500)[:, 1:])
        assert chisquare(torch.bincount(drawn[-1].flatten(), minlength=16).numpy()).pvalue > 1e-3
        bank.update(index, torch.randn(16, 4))
    pairs = 16 * drawn[0] + drawn[1]
    assert chisquare(torch.bincount(pairs.flatten(), minlength=256).numpy()).pvalue > 1e-3
    neighbours = 16 * drawn[0][1:] + drawn[0][:-1]
    assert chisquare(torch.bincount(neighbours.flatten(), minlength=256).numpy()).pvalue > 1e-3


def test_negatives_of_an_image_do_not_depend_on_the_batch_it_comes_in():
    bank, index = Bank(100, 4), torch.tensor([5, 77, 3, 12])
    whole = bank.sample(index, 30)
    assert torch.equal(torch.cat([bank.sample(part, 30) for part in index.chunk(2)]), whole)
    assert torch.equal(bank.sample(index.flip(0), 30).flip(0), whole)


def test_banks_of_different_seeds_draw_differently():
    index = torch.arange(50)
    first, second = Bank(100, 4).sample(index, 30), Bank(100, 4).sample(index, 30)
    assert (first[:, 1:] == second[:, 1:]).float().mean() < 0.05


def test_negatives_are_those_of_the_bank_seed_and_count_as_plain_numbers():
    bank, index = Bank(100, 4), torch.tensor([5, 77])
    bank.updates += 3
    assert torch.equal(bank.sample(index, 8)[:, 1:], integers(int(bank.seed), 3, index, 8, 100))
    assert torch.equal(bank.sample(index, 8)[:, 1:], integers(int(bank.seed), bank.updates, index, 8, 100))


def test_no_value_of_a_memory_is_read_by_the_host():
    # Meta tensors hold no values: whatever needs one raises, as a GPU would have to be waited for.
    bank, queue = Bank(100, 4).to("meta"), Queue(10, 4).to("meta")
    index, z = torch.empty(5, dtype=torch.long, device="meta"), torch.empty(5, 4, device="meta")
    assert bank.draw(index, 8).shape == (5, 9, 4)
    bank.update(index, z)
    queue.push(z)


def test_printed_memories_tell_their_sizes():
    assert repr(Queue(10, 4)) == "Queue(size=10, dim=4)"
    assert repr(Bank(10, 4, 0.25)) == "Bank(size=10, dim=4, momentum=0.25)"


# Under DDP


class Remembers(nn.Module):
    """A layer with BatchNorm, a queue and a bank, as a method is built."""

    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.inner = nn.ModuleDict({"queue": Queue(6, 4), "bank": Bank(8, 4)})

    def forward(self, x):
        return self.f(x)


def test_memory_buffers_are_named_as_in_the_state_dict():
    module = Remembers()
    names = {f"inner.queue.{key}" for key in ("keys", "pointer")}
    names |= {f"inner.bank.{key}" for key in ("slots", "updates", "seed")}
    found = memory_buffers(module)
    assert set(found) == names
    assert names < module.state_dict().keys()
    assert all(module.get_buffer(name) is buffer for name, buffer in found.items())
    assert set(memory_buffers(Queue(2, 2))) == {"keys", "pointer"}


def under_ddp(rank):
    """Which memories DDP has left alone, and what it has made of the rest."""
    torch.manual_seed(rank)
    module = Remembers()
    module.f[1].running_mean.fill_(rank)
    module._ddp_params_and_buffers_to_ignore = list(memory_buffers(module))
    mine = {name: buffer.clone() for name, buffer in memory_buffers(module).items()}
    parallel = DistributedDataParallel(module)
    mean = module.f[1].running_mean.clone()
    for _ in range(2):  # buffers are sent in every forward pass
        parallel(torch.randn(4, 3)).square().sum().backward()
    kept = {name: torch.equal(mine[name], buffer) for name, buffer in memory_buffers(module).items()}
    return kept, mean, module.f[0].weight.grad


def remember(rank, z, index):
    torch.manual_seed(0)
    queue, bank = Queue(11, 4).double(), Bank(20, 4).double()
    for step in range(3):
        queue.push(dist.mine(z[step]))
        bank.update(dist.mine(index[step]), dist.mine(z[step]))
    sampled = dist.all_gather(bank.sample(dist.mine(index[0]), 6))
    return {**queue.state_dict(), **bank.state_dict()}, sampled


def both(rank, z, index):
    return *remember(rank, z, index), under_ddp(rank)


@pytest.fixture(scope="module")
def visits():
    torch.manual_seed(4)
    z = normalize(torch.randn(3, 8, 4, dtype=torch.double), dim=-1)
    return z, torch.stack([torch.randperm(20)[:8] for _ in range(3)])


@pytest.fixture(scope="module")
def ranks(visits):
    return on_ranks(2, both, *visits)


def test_two_ranks_remember_what_one_rank_of_both_batches_does(visits, ranks):
    alone, negatives = remember(0, *visits)
    for states, sampled, _ in ranks:
        assert states.keys() == alone.keys()
        assert all(torch.equal(states[key], alone[key]) for key in alone)
        assert torch.equal(sampled, negatives)


def test_ddp_sends_batchnorm_and_gradients_but_no_memory(ranks):
    (_, _, (kept, mean, grad)), (_, _, (kept_too, mean_too, grad_too)) = ranks
    assert len(kept) == 5
    assert all(kept.values())
    assert all(kept_too.values())  # rank 0's would have replaced them
    assert not mean.any()
    assert not mean_too.any()
    assert torch.equal(grad, grad_too)
