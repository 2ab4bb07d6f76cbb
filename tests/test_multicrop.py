"""Multi-crop with every method that compares views: the loss, pair by pair, on one rank and on two."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from conftest import TinyOfCrops, close, on_ranks
from ranks import assert_same, random_batches, train_alone
from runs import archive
from sslzoo.__main__ import main
from sslzoo.blocks.crops import full_views
from sslzoo.blocks.norm import sync_batchnorm
from sslzoo.config import composed, options
from sslzoo.method import Batch
from sslzoo.methods import BYOL, DINO, InvaSpread, MoCo, MoCoV3, SimCLR, SimSiam, SwAV
from sslzoo.optim import Optim
from sslzoo.tasks.pretrain import build_method
from sslzoo.tasks.runs import images

SGD = Optim(lr=0.1, lr_per=None, batch_size=8, momentum=0.9, weight_decay=1e-3)
FULL, SMALL = (3, 4, 4), (3, 2, 2)
CROPS = [FULL, FULL, SMALL, SMALL]
ALL_TO_FULL = [(0, 1), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1)]  # (query or prediction, key or target)
ONE_VIEW = ["cmc", "cpc", "cpc_v2", "instdisc"]


def moco(**options) -> MoCo:
    """Without BatchNorm groups, as encoders without BatchNorm are trained."""
    return MoCo(TinyOfCrops(norm=False), SGD, dim=6, queue_size=24, bn_groups=1, momentum=0.9, **options).double()


def moco_symmetric() -> MoCo:
    return moco(symmetric=True)


def moco_in_groups() -> MoCo:
    return MoCo(TinyOfCrops(), SGD, dim=6, queue_size=24, bn_groups=2, momentum=0.9, symmetric=True).double()


def moco_v3() -> MoCoV3:
    return sync_batchnorm(MoCoV3(TinyOfCrops(), SGD, dim=6, hidden=16, temperature=0.2, momentum=0.9).double())


def byol() -> BYOL:
    return sync_batchnorm(BYOL(TinyOfCrops(), SGD, dim=6, hidden=16, momentum=0.9).double())


def simsiam() -> SimSiam:
    return sync_batchnorm(SimSiam(TinyOfCrops(), SGD, dim=6, bottleneck=4).double())


def simclr() -> SimCLR:
    return sync_batchnorm(SimCLR(TinyOfCrops(), SGD, dim=6, temperature=0.2, queue_size=24, momentum=0.9).double())


def invaspread() -> InvaSpread:
    return sync_batchnorm(InvaSpread(TinyOfCrops(), SGD, dim=6, temperature=0.5).double())


def swav() -> SwAV:
    return sync_batchnorm(SwAV(TinyOfCrops(), SGD, hidden=10, dim=6, prototypes=7).double())


def dino() -> DINO:
    return sync_batchnorm(DINO(TinyOfCrops(), SGD, hidden=10, bottleneck=5, out_dim=9, use_bn=True).double())


# The loss, by hand


def one_by_one(net, views):
    """Each view passes BatchNorm alone."""
    return [normalize(net(x), dim=1) for x in views]


def together(net, views):
    """All views of one size pass BatchNorm together, and a head's BatchNorm sees all views."""
    h = [net[0](torch.cat(views[:2])), net[0](torch.cat(views[2:]))]
    return normalize(net[1](torch.cat(h)), dim=1).chunk(len(views))


def told_apart(queries, keys, others, temperature):
    """InfoNCE, query by query: its own key among ``others[b]``."""
    terms = []
    for b, (q, k) in enumerate(zip(queries, keys, strict=True)):
        against = torch.stack([k, *others[b]]) @ q / temperature
        terms.append(against.logsumexp(0) - k @ q / temperature)
    return torch.stack(terms).mean()


def moco_by_hand(method, views, keyed):
    q = one_by_one(lambda x: method.projector(method.encoder(x)), views)
    k = one_by_one(method.target, views[:2])
    negatives = [method.queue.keys] * len(views[0])
    pairs = [(i, j) for i, j in ALL_TO_FULL if j in keyed]
    return sum(told_apart(q[i], k[j], negatives, method.temperature) for i, j in pairs) / len(pairs)


def moco_v3_by_hand(method, views):
    q = one_by_one(lambda x: method.predictor(method.projector(method.encoder(x))), views)
    k = one_by_one(method.target, views[:2])
    rest = [[torch.cat([key[:b], key[b + 1 :]]) for b in range(len(key))] for key in k]
    terms = [2 * 0.2 * told_apart(q[i], k[j], rest[j], 0.2) for i, j in ALL_TO_FULL]
    return 2 * sum(terms) / len(terms)


def byol_by_hand(method, views):
    p = [method.predictor(method.projector(method.encoder(x))) for x in views]
    z = [method.target(x) for x in views[:2]]
    terms = [(2 - 2 * cosine_similarity(p[i], z[j])).mean() for i, j in ALL_TO_FULL]
    return 2 * sum(terms) / len(terms)


def simsiam_by_hand(method, views):
    z = [method.projector(method.encoder(x)) for x in views]
    terms = [-cosine_similarity(method.predictor(z[i]), z[j].detach()).mean() for i, j in ALL_TO_FULL]
    return sum(terms) / len(terms)


UNORDERED = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]  # both views of a pair are anchors


def simclr_by_hand(method, views):
    z = together((method.encoder, method.projector), views)
    terms = []
    for i, j in UNORDERED:
        for one, other in ((z[i], z[j]), (z[j], z[i])):
            rest = [torch.cat([one[:b], one[b + 1 :], other[:b], other[b + 1 :]]) for b in range(len(one))]
            terms.append(told_apart(one, other, [torch.cat([r, method.queue.keys]) for r in rest], 0.2))
    return sum(terms) / len(terms)


def invaspread_by_hand(method, views):
    z = together((method.encoder, method.projector), views)
    terms = []
    for i, j in UNORDERED:
        pair, batch = torch.cat([z[i], z[j]]), len(z[i])
        for a in range(2 * batch):
            others = [b for b in range(2 * batch) if b != a]
            p = (pair[others] @ pair[a] / 0.5).softmax(0)
            twin = others.index((a + batch) % (2 * batch))
            terms.append(-p[twin].log() - (1 - torch.cat([p[:twin], p[twin + 1 :]])).log().sum())
    return sum(terms) / len(terms)


@pytest.mark.parametrize(
    ("make", "by_hand"),
    [
        (moco, lambda method, views: moco_by_hand(method, views, keyed=[1])),
        (moco_symmetric, lambda method, views: moco_by_hand(method, views, keyed=[0, 1])),
        (moco_v3, moco_v3_by_hand),
        (byol, byol_by_hand),
        (simsiam, simsiam_by_hand),
        (simclr, simclr_by_hand),
        (invaspread, invaspread_by_hand),
    ],
    ids=["moco", "moco_symmetric", "moco_v3", "byol", "simsiam", "simclr", "invaspread"],
)
def test_loss_is_the_mean_over_pairs_of_a_full_crop_and_another(make, by_hand):
    method, (batch,) = make(), random_batches(1, 8, CROPS)
    close(method.loss(batch), by_hand(method, batch.views))


MAKES = [moco, moco_in_groups, moco_v3, byol, simsiam, simclr, invaspread, swav, dino]


def train_all(rank, batches):
    return {make.__name__: train_alone(make, batches) for make in MAKES}


@pytest.fixture(scope="module")
def ranks():
    """All methods trained on two ranks."""
    return on_ranks(2, train_all, random_batches(3, 8, CROPS))


@pytest.mark.parametrize("make", MAKES, ids=lambda make: make.__name__)
def test_two_ranks_equal_one(ranks, make):
    alone = train_alone(make, random_batches(3, 8, CROPS))
    # MoCo's running statistics stay per device, as in the paper; they take no part in training.
    skip = ["running_", "num_batches"] if make is moco_in_groups else []
    for rank in ranks:
        assert_same(alone, rank[make.__name__], skip=skip)


@pytest.mark.parametrize("make", MAKES, ids=lambda make: make.__name__)
def test_small_crops_are_learned_from_but_are_no_targets(make):
    """Targets come from networks that the small crops never pass, so only queries see them."""
    method, (batch,) = make(), random_batches(1, 8, CROPS)
    seen = []
    if hasattr(method, "target"):
        method.target.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1:]))
    small = batch.views[3].requires_grad_()
    method.loss(batch).backward()
    assert (small.grad != 0).any()
    assert set(seen) <= {FULL}


def test_moco_asymmetric_remembers_one_key_an_image_and_symmetric_two():
    for make, pushed in ((moco, 8), (moco_symmetric, 16)):
        method, (batch,) = make(), random_batches(1, 8, CROPS)
        before = method.queue.keys.clone()
        method.loss(batch)
        method.after_step()
        assert int((method.queue.keys != before).any(1).sum()) == pushed


def test_full_views_are_the_first_two_and_those_after_them_of_the_first_ones_size():
    shapes = {2: [FULL, FULL], 3: [FULL, FULL, FULL, SMALL, FULL]}
    for count, sizes in shapes.items():
        assert full_views([torch.zeros(1, *size) for size in sizes]) == count
    assert full_views([torch.zeros(1, *size) for size in (FULL, SMALL, SMALL)]) == 2


# From the command line


@pytest.mark.parametrize("name", sorted(set(options("method")) - set(ONE_VIEW)))
def test_every_recipe_that_compares_views_takes_multicrop(tmp_path, name):
    small = ["data=npz", f"data.root={archive(tmp_path / 'noise.npz')}", "data.batch_size=16", "encoder.width=0.0625"]
    queue = ["method.queue_size=32"] if "queue_size" in composed([f"method={name}"]).method else []
    config = composed([f"method={name}", "views=multicrop", "image_size=16", "local_size=8", *small, *queue])
    data = images(config)
    method = build_method(config, data.train)
    views = data.views(data.train.images[:16], range(16), 0)
    assert [x.shape[2] for x in views] == [16, 16, 8, 8, 8, 8, 8, 8]
    loss = method.loss(Batch(views, torch.arange(16), torch.zeros(16)))
    loss.backward()
    assert torch.isfinite(loss)


def complaint(capsys, tmp_path, *arguments):
    data = ["data=npz", f"data.root={archive(tmp_path / 'noise.npz')}", "data.batch_size=16"]
    run_dir = tmp_path / "run"
    assert main([*arguments, *data, f"run_dir={run_dir}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert not run_dir.exists()
    return line


@pytest.mark.parametrize("name", ONE_VIEW)
def test_multicrop_is_refused_by_methods_of_one_view(capsys, tmp_path, name):
    negatives = [] if name.startswith("cpc") else ["method.negatives=8"]
    line = complaint(capsys, tmp_path, f"method={name}", "views=multicrop", *negatives)
    assert line.startswith(f"sslzoo: method={name} learns from one view of an image but the configured views give 8")
    assert "views=single" in line


@pytest.mark.parametrize("name", ["moco", "invaspread", "swav"])
def test_a_single_view_is_refused_by_methods_that_compare_views(capsys, tmp_path, name):
    queue = ["method.queue_size=32"] if name != "invaspread" else []
    line = complaint(capsys, tmp_path, f"method={name}", "views=single", *queue)
    assert line.startswith(f"sslzoo: method={name} compares views of an image but the configured views give 1")
    assert "views=multicrop" in line
