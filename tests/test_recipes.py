"""Every recipe at every scale, composed: sizes that fit each other, and the paper's values at the paper's scale."""

import re

import pytest
from omegaconf import OmegaConf

from sslzoo.blocks.crops import check_count
from sslzoo.config import CONF, build_optim, composed, options
from sslzoo.tasks.runs import views_of

IMAGES = {"demo": 8192, "cifar": 50_000, "imagenet": 1_281_167}
PIXELS = {"demo": 32, "cifar": 32, "imagenet": 224}
TRAINS = {"demo": "photos", "cifar": "cifar10", "imagenet": "imagenet"}
COMPARES_NONE = {"cmc", "cpc", "cpc_v2", "instdisc"}
SCALES = pytest.mark.parametrize("scale", options("scale"))
METHODS = pytest.mark.parametrize("method", options("method"))


def header(method: str) -> str:
    """The comments that a recipe opens with."""
    lines = (CONF / "method" / f"{method}.yaml").read_text().splitlines()
    return " ".join(line.lstrip("# ") for line in lines[: lines.index("defaults:")])


@METHODS
def test_a_recipe_opens_with_paper_hardware_epochs_and_target(method):
    found = header(method)
    assert re.search(r"et al\. 20\d\d|and He 20\d\d|Xie and He", found), "no authors"
    assert re.search(r"arXiv \d{4}\.\d{5}", found), "no paper"
    assert re.search(r"hardware: .*(GPU|TPU|device)", found), "no hardware"
    assert re.search(r"epochs: ", found), "no epochs"
    assert re.search(r"target: .*\d\d\.\d %", found), "no number to reach"


@METHODS
@SCALES
def test_data_sizes_and_training_fit_the_scale_and_each_other(method, scale):
    config = composed([f"method={method}", f"scale={scale}"])
    images, batch = IMAGES[scale], config.data.batch_size
    assert config.recipe == method
    assert config.data.name == TRAINS[scale]
    assert config.image_size >= config.local_size >= 12
    assert (config.image_size == PIXELS[scale]) or method.startswith("cpc")
    assert 32 <= batch <= images / 8
    assert 1 <= config.trainer.max_epochs <= 1000
    assert 1 <= config.trainer.accumulate_grad_batches <= 64
    if scale != "imagenet":
        assert config.encoder.stem == "small"
        assert config.encoder.name.startswith("resnet")


@METHODS
@SCALES
def test_rates_rise_and_fall_within_the_run(method, scale):
    config = composed([f"method={method}", f"scale={scale}"])
    optim, epochs = build_optim(config), config.trainer.max_epochs
    assert 0 <= optim.warmup_epochs <= epochs / 3
    rates = [optim.lr_at(step, 100 * epochs, 100) for step in range(0, 100 * epochs, 25)]
    assert 0 < max(rates) <= optim.peak_lr * (1 + 1e-9)
    assert min(rates) >= 0
    assert max(rates) < (1 if optim.name == "adamw" else 100)
    assert optim.schedule == "constant" or rates[-1] < max(rates)
    assert all(0 <= optim.weight_decay_at(t) < 1 for t in (0, 0.5, 1))


@METHODS
@SCALES
def test_memories_hold_a_batch_and_no_more_than_the_images(method, scale):
    config = composed([f"method={method}", f"scale={scale}"])
    settings, batch = config.method, config.data.batch_size
    queue, negatives = settings.get("queue_size") or 0, settings.get("negatives") or 0
    assert queue == 0 or batch <= queue <= IMAGES[scale]
    assert 0 <= negatives <= IMAGES[scale]
    assert settings.get("size") is None  # the data says
    assert batch % settings.get("group", 1) == 0
    assert batch % (settings.get("bn_groups") or 1) == 0


@METHODS
@SCALES
def test_views_are_as_many_as_the_method_compares_and_of_the_scales_sizes(method, scale):
    config = composed([f"method={method}", f"scale={scale}"])
    views = views_of(config)
    check_count(views.count, method, method not in COMPARES_NONE)
    assert views.sizes[0] == max(views.sizes)
    if scale == "demo":  # where tuning takes smaller ones
        assert config.local_size <= min(views.sizes) <= max(views.sizes) <= config.image_size
    else:
        assert set(views.sizes) <= {config.image_size, config.local_size}


@pytest.mark.parametrize("method", ["cpc", "cpc_v2"])
@SCALES
def test_patches_fill_the_image_and_offsets_stay_within_their_grid(method, scale):
    config = composed([f"method={method}", f"scale={scale}"])
    patch, stride = config.encoder.patch, config.encoder.stride
    over, rest = divmod(config.image_size - patch, stride)
    assert rest == 0
    assert over >= 2
    assert max(config.method.offsets) <= over
    assert config.method.crop < patch


@METHODS
def test_the_papers_scale_changes_nothing_that_the_recipe_says(method):
    recipe, config = (
        OmegaConf.load(CONF / "method" / f"{method}.yaml"),
        composed([f"method={method}", "scale=imagenet"]),
    )
    tuned = CONF / "tuned" / "imagenet" / f"{method}.yaml"
    changed = set(OmegaConf.load(tuned)) if tuned.is_file() else set()
    for group in ("method", "optim", "trainer"):
        for key, value in (recipe.get(group) or {}).items():
            if f"{group}.{key}" not in changed:
                assert config[group][key] == value, f"{group}.{key}"


@METHODS
def test_batch_and_epochs_are_at_the_papers_scale_those_of_the_header(method):
    config, found = composed([f"method={method}", "scale=imagenet"]), header(method)
    batch, epochs = re.search(r"batch (\d+)", found), re.search(r"epochs: \D*(\d+)", found)
    assert config.trainer.max_epochs == int(epochs[1])
    assert config.data.batch_size * config.trainer.accumulate_grad_batches == int(batch[1])
