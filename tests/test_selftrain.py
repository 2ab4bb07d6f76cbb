"""Self-training's pieces: which boxes are kept, how two losses are weighed, what a student is."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from boxed import random_truth
from conftest import on_ranks
from sslzoo.data.mixed import MixedBatch
from sslzoo.errors import UserError
from sslzoo.method import Method
from sslzoo.optim import Optim
from sslzoo.selftrain import LossBalance, Student, density_threshold, fingerprint, select


def losses(steps: int = 50, seed: int = 0) -> torch.Tensor:
    """Human and pseudo losses that fall, the pseudo ones at another scale, ``(steps, 2)`` float64."""
    rng = np.random.default_rng(seed)
    fall = np.exp(-np.arange(steps) / 30)[:, None]
    return torch.from_numpy(fall * rng.uniform(0.5, 1.5, (steps, 2)) * [1.0, 7.0])


def by_formula(history: np.ndarray, alpha: float, decay: float) -> list[float]:
    """``1/(1+a) (L_h + a (mean L_h / mean L_p) L_p)`` with the means as explicit sums over all steps before."""
    found = []
    for t in range(len(history)):
        weights = (1 - decay) * decay ** np.arange(t, -1, -1)
        mean_human, mean_pseudo = (weights[:, None] * history[: t + 1]).sum(0)
        human, pseudo = history[t]
        found.append((human + alpha * mean_human / mean_pseudo * pseudo) / (1 + alpha))
    return found


@pytest.mark.parametrize("alpha", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("decay", [0.9997, 0.9])
def test_the_loss_is_the_papers_over_fifty_steps(alpha, decay):
    history = losses()
    balance = LossBalance(alpha, decay)
    found = [balance(*pair).item() for pair in history]
    np.testing.assert_allclose(found, by_formula(history.numpy(), alpha, decay), rtol=1e-5)


def test_the_means_carry_no_gradient_and_both_losses_do():
    balance = LossBalance(alpha=2.0)
    human, pseudo = (torch.tensor(value, requires_grad=True) for value in (3.0, 12.0))
    balance(human, pseudo).backward()
    assert human.grad.item() == pytest.approx(1 / 3)
    assert pseudo.grad.item() == pytest.approx(2 / 3 * 3 / 12)
    assert not balance.means.requires_grad


def test_a_balance_goes_on_where_it_stood():
    history = losses()
    whole, first, second = LossBalance(), LossBalance(), LossBalance()
    expected = [whole(*pair).item() for pair in history]
    found = [first(*pair).item() for pair in history[:20]]
    second.load_state_dict(first.state_dict())
    found += [second(*pair).item() for pair in history[20:]]
    assert found == expected


def balanced_on_rank(rank: int, history: torch.Tensor) -> tuple[list[float], torch.Tensor]:
    balance = LossBalance()
    return [balance(*pair).item() for pair in history[rank]], balance.means


def test_two_ranks_share_their_means_and_so_equal_one():
    history = torch.stack([losses(seed=1), losses(seed=2)])  # (ranks, steps, 2)
    (one, means), (other, others) = on_ranks(2, balanced_on_rank, history)
    alone = LossBalance()
    expected = [alone(*pair).item() for pair in history.mean(0)]
    assert torch.equal(means, others)
    torch.testing.assert_close(means, alone.means)
    # Both ranks weigh by the same ratio, so the mean of their losses is the loss of their mean
    np.testing.assert_allclose((np.array(one) + np.array(other)) / 2, expected, rtol=1e-5)


def test_a_loss_that_vanishes_is_not_blown_up():
    balance = LossBalance()
    for _ in range(3):
        found = balance(torch.tensor(1.0), torch.tensor(0.0))
    assert found.item() == pytest.approx(0.5)
    assert balance(torch.tensor(1.0), torch.tensor(1e-12)).item() == pytest.approx(0.5)


def test_a_step_without_pseudo_labels_says_nothing_of_their_scale():
    history = losses(10)
    balance, without = LossBalance(), LossBalance()
    for pair in history:
        with_gaps = balance(*pair)
        balance(pair[0], torch.zeros(()))
        assert with_gaps == without(*pair)
    assert torch.equal(balance.means, without.means)


def test_a_weight_below_zero_is_refused():
    with pytest.raises(UserError, match="alpha=-1"):
        LossBalance(alpha=-1)


# Which boxes are kept


def found_in(boxes, scores, labels=None) -> dict:
    n = len(scores)
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(n, 4),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "labels": torch.tensor([1] * n if labels is None else labels),
    }


@pytest.fixture
def images():
    """Three images of 120 pixels, without labels."""
    return random_truth(np.random.default_rng(0), images=3).unlabelled()


def test_boxes_of_the_threshold_or_more_stay_in_their_images(images):
    found = [
        found_in([[0, 0, 10, 20], [5, 5, 30, 30]], [0.9, 0.49], [2, 1]),
        found_in([], []),
        found_in([[1, 2, 4, 8], [50, 50, 60, 70]], [0.75, 0.5], [3, 1]),
    ]
    pseudo = select(images, found, 0.5)
    assert pseudo.images.starts.tolist() == [0, 1, 1, 3]
    assert pseudo.images.xywh.tolist() == [[0, 0, 10, 20], [1, 2, 3, 6], [50, 50, 10, 20]]
    assert pseudo.images.labels.tolist() == [2, 3, 1]
    assert pseudo.images.areas.tolist() == [200, 18, 200]
    assert pseudo.scores.tolist() == pytest.approx([0.9, 0.75, 0.5])
    assert (pseudo.density, pseudo.empty, pseudo.threshold) == (1.0, pytest.approx(1 / 3), 0.5)
    assert pseudo.with_boxes().image_ids == [images.image_ids[0], images.image_ids[2]]
    assert len(images.labels) == 0


def test_boxes_are_cut_to_their_image_and_thin_ones_dropped(images):
    boxes = [[-5, -5, 10, 10], [118, 0, 200, 50], [118.5, 0, 200, 50], [10, 10, 40, 11.9], [10, 10, 12, 12]]
    pseudo = select(images, [found_in(boxes, [0.9] * 5), found_in([], []), found_in([], [])])
    assert pseudo.images.xywh.tolist() == [[0, 0, 10, 10], [118, 0, 2, 50], [10, 10, 2, 2]]


def test_match_density_keeps_as_many_boxes_an_image_as_labels_have(images):
    rng = np.random.default_rng(1)
    found = [found_in([[0, 0, 20, 20]] * 10, rng.permutation(np.linspace(0.06, 0.4, 10)).tolist()) for _ in range(3)]
    pseudo = select(images, found, "match-density", density=2.34)
    assert len(pseudo.scores) >= 7  # 2.34 x 3 images; scores that are equal stay together
    everything = np.sort(torch.cat([each["scores"] for each in found]).double().numpy())
    assert pseudo.threshold == everything[-7]
    assert pseudo.scores.min() == pseudo.threshold


def test_the_score_that_a_number_of_boxes_reach():
    scores = np.array([0.2, 0.9, 0.5, 0.7])
    assert [density_threshold(scores, wanted) for wanted in (1, 2.4, 2.6, 4, 9)] == [0.9, 0.7, 0.5, 0.2, 0.2]
    assert density_threshold(scores, 0.0) == density_threshold(scores[:0], 3) == 1.0


def test_no_confident_box_is_no_crash(images):
    for found in ([found_in([], [])] * 3, [found_in([[0, 0, 9, 9]], [0.1])] * 3):
        pseudo = select(images, found, 0.5)
        assert (len(pseudo.with_boxes()), pseudo.density, pseudo.empty) == (0, 0.0, 1.0)


@pytest.mark.parametrize("threshold", [1.5, -0.1, "high"])
def test_other_thresholds_are_refused(images, threshold):
    with pytest.raises(UserError, match=r"neither a score from 0 to 1 nor match-density"):
        select(images, [found_in([], [])] * 3, threshold)


# The student


class Line(Method):
    """A learner of one weight, whose loss is that of the numbers it is given."""

    sync_batchnorm = True
    settings = "task.optim"

    def __init__(self):
        super().__init__(nn.Linear(1, 1), Optim(lr=0.1, lr_per=None))
        self.seen, self.steps_begun = [], 0

    def loss(self, batch):
        self.seen.append(batch.images)
        return self.encoder(batch.images).square().mean()

    def before_step(self):
        self.steps_begun += 1


def test_a_student_is_its_learner_on_both_halves():
    learner = Line()
    student = Student(learner, LossBalance(alpha=0.5))
    halves = [SimpleNamespace(images=torch.randn(4, 1), index=torch.arange(4)) for _ in range(2)]
    human, pseudo = (learner.encoder(half.images).square().mean() for half in halves)
    batch = MixedBatch(*halves)
    assert student.loss(batch).item() == pytest.approx((human + 0.5 * human / pseudo * pseudo).item() / 1.5, rel=1e-5)
    assert [seen is half.images for seen, half in zip(learner.seen, halves, strict=True)] == [True, True]
    assert batch.index.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    student.before_step()
    assert learner.steps_begun == 1
    assert (student.sync_batchnorm, student.settings, student.optim) == (True, "task.optim", learner.optim)
    of = {id(p) for group in student.parameter_groups() for p in group["params"]}
    assert of == {id(p) for p in learner.parameters()}
    assert "balance.means" in student.state_dict()


def test_equal_starts_have_equal_fingerprints_and_others_have_not():
    torch.manual_seed(3)
    one = nn.BatchNorm1d(4), nn.Linear(4, 2)
    torch.manual_seed(3)
    other = nn.BatchNorm1d(4), nn.Linear(4, 2)
    told = [fingerprint(nn.Sequential(*layers)) for layers in (one, other)]
    assert told[0] == told[1]
    one[0].running_mean[2] += 1e-7
    assert fingerprint(nn.Sequential(*one)) != told[0]
