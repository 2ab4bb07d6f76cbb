"""Views against torchvision on the same draws, the draws against torchvision's laws, and both against chance."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from math import ceil
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from scipy.stats import chisquare, ks_2samp
from skimage import data
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from sslzoo.errors import UserError
from sslzoo.views import (
    Blur,
    Clean,
    Jitter,
    Solarize,
    View,
    Views,
    integers,
    parse,
    permutation,
    table,
)
from sslzoo.views.draw import BRIGHTNESS, CONTRAST, HUE, SATURATION

CONF = Path(__file__).parents[1] / "conf"
LEVEL = 1 / 255
MODES = {"bilinear": F.InterpolationMode.BILINEAR, "bicubic": F.InterpolationMode.BICUBIC}
JITTER = Jitter(0.4, 0.4, 0.4, 0.1, p=1.0)
RICH = View(
    24, interpolation="bicubic", jitter=Jitter(0.4, 0.4, 0.4, 0.1), gray=0.3, blur=Blur(0.5), solarize=Solarize(0.3)
)


def noise(height: int = 61, width: int = 47) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photo() -> np.ndarray:
    return np.ascontiguousarray(data.astronaut()[:375, :500])


IMAGES = pytest.mark.parametrize("image", [noise(), photo(), data.chelsea()], ids=["noise", "astronaut", "cat"])


def unit(view: View, seed: int = 0) -> Views:
    """Views whose output stays in 0..1."""
    return Views([view], mean=(0, 0, 0), std=(1, 1, 1), seed=seed)


def reference(image: np.ndarray, view: View, row: np.void) -> torch.Tensor:
    """One view composed of torchvision's float functionals, as the row of the table says: (3, S, S) in 0..1."""
    x = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    box = [int(row[name]) for name in ("top", "left", "height", "width")]
    x = F.resized_crop(x, *box, [view.size, view.size], MODES[view.interpolation], antialias=True).clamp(0, 1)
    x = F.horizontal_flip(x) if row["flip"] else x
    x = F.rgb_to_grayscale(x, 3) if row["gray"] and view.gray_first else x
    adjust = {
        BRIGHTNESS: lambda x: F.adjust_brightness(x, float(row["brightness"])),
        CONTRAST: lambda x: F.adjust_contrast(x, float(row["contrast"])),
        SATURATION: lambda x: F.adjust_saturation(x, float(row["saturation"])),
        HUE: lambda x: F.adjust_hue(x, float(row["hue"])),
    }
    for op in row["order"]:
        x = adjust[int(op)](x)
    x = F.rgb_to_grayscale(x, 3) if row["gray"] and not view.gray_first else x
    if row["sigma"] > 0:
        kernel = view.blur.kernel or 2 * min(ceil(3 * row["sigma"]), view.size - 1) + 1
        x = F.gaussian_blur(x, [kernel, kernel], [float(row["sigma"])] * 2)
    return F.solarize(x, view.solarize.threshold) if row["solarize"] else x


def difference(image: np.ndarray, view: View, **changes: object) -> float:
    """The largest difference from the reference, in 255ths, for plain draws with some fields changed."""
    views = unit(view)
    rows = views.table([image], [3], 0)
    rows["flip"] = rows["gray"] = rows["solarize"] = rows["sigma"] = rows["hue"] = 0
    rows["brightness"] = rows["contrast"] = rows["saturation"] = 1
    for name, value in changes.items():
        rows[name] = value
    (got,) = views.render([image], rows)
    return float((got[0] - reference(image, view, rows[0, 0])).abs().max()) / LEVEL


# One operation at a time


@IMAGES
@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("size", [7, 24, 64, 224])
def test_crop_and_antialiased_resize_agree_up_and_down(image, interpolation, size):
    assert difference(image, View(size, interpolation=interpolation)) < 0.01


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("box", [(0, 0, 1, 1), (5, 9, 1, 30), (0, 0, 61, 47), (60, 0, 1, 47), (10, 3, 24, 24)])
def test_resize_agrees_on_boxes_at_the_edge_and_of_one_pixel(interpolation, box):
    changes = dict(zip(("top", "left", "height", "width"), box, strict=True))
    assert difference(noise(), View(24, interpolation=interpolation), **changes) < 0.01


def test_flip_mirrors_exactly():
    views = unit(View(32))
    rows = views.table([photo()], [0], 0)
    rows["flip"] = 0
    (plain,) = views.render([photo()], rows)
    rows["flip"] = 1
    (mirrored,) = views.render([photo()], rows)
    assert torch.equal(mirrored, plain.flip(3))


@IMAGES
@pytest.mark.parametrize("factor", [0.0, 0.3, 0.9, 1.7])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colour_factor_agrees(image, name, factor):
    assert difference(image, View(40), **{name: factor}) < 0.01


@IMAGES
@pytest.mark.parametrize("shift", [-0.5, -0.2, 0.05, 0.31, 0.5])
def test_hue_agrees(image, shift):
    assert difference(image, View(40), hue=shift) < 0.05


def test_hue_leaves_gray_pixels_alone():
    gray = np.repeat(noise()[:, :, :1], 3, axis=2)
    assert difference(gray, View(40), hue=0.3) < 0.01


@pytest.mark.parametrize("order", permutations(range(4)))
def test_jitter_order_agrees(order):
    changes = {"brightness": 1.3, "contrast": 0.7, "saturation": 1.35, "hue": -0.08, "order": order}
    assert difference(photo(), View(40), **changes) < 0.05


@IMAGES
@pytest.mark.parametrize("gray_first", [False, True])
def test_gray_agrees_before_and_after_jitter(image, gray_first):
    changes = {"gray": 1, "brightness": 1.3, "contrast": 0.7, "hue": 0.1}
    assert difference(image, View(40, gray_first=gray_first), **changes) < 0.05


@pytest.mark.parametrize("size", [3, 24, 65])
@pytest.mark.parametrize("sigma", [0.1, 0.33, 0.7, 1.0, 1.4, 2.0])
def test_blur_agrees_at_three_sigma(size, sigma):
    assert difference(photo(), View(size, blur=Blur(1.0)), sigma=sigma) < 0.01


@pytest.mark.parametrize("kernel", [1, 3, 9, 23])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_with_a_given_kernel_agrees(kernel, sigma):
    assert difference(noise(), View(24, blur=Blur(1.0, kernel=kernel)), sigma=sigma) < 0.05


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 1.0])
def test_solarize_agrees(threshold):
    view = View(61, solarize=Solarize(1.0, threshold))
    box = {"top": 0, "left": 0, "height": 61, "width": 61}  # no resampling: no value within rounding of 0.5
    assert difference(noise(61, 61), view, solarize=1, **box) < 0.01


def test_normalise_subtracts_the_mean_and_divides_by_the_deviation():
    mean, std = (0.1, 0.5, 0.7), (0.2, 0.3, 0.4)
    (plain,) = unit(RICH)([photo()], [5], 1)
    (got,) = Views([RICH], mean, std)([photo()], [5], 1)
    torch.testing.assert_close(got, F.normalize(plain, mean, std), rtol=0, atol=1e-5)


@IMAGES
@pytest.mark.parametrize("name", ["instdisc", "moco_v2", "byol", "dino", "swav", "simclr"])
def test_whole_recipe_agrees_with_torchvision_driven_by_the_table(image, name):
    views = Views(recipe(name), mean=(0, 0, 0), std=(1, 1, 1))
    index = np.arange(12)
    rows = views.table([image] * 12, index, 3)
    for view, got, column in zip(views.views, views([image] * 12, index, 3), rows.T, strict=True):
        for x, row in zip(got, column, strict=True):
            error = (x - reference(image, view, row)).abs() / LEVEL
            if row["solarize"]:  # a value within rounding of the threshold may fall on either side
                error = error.flatten().sort().values[:-3]
            assert error.max() < 0.1


# The draws


def draws(view: View, n: int = 3000, height: int = 375, width: int = 500) -> np.ndarray:
    return table([view], 0, 0, np.arange(n), height, width)[:, 0]


def crops(scale: tuple, ratio: tuple, n: int = 3000) -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    image = torch.empty(3, 375, 500)
    boxes = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(n)], float)
    return features(*boxes.T)


def features(top, left, height, width) -> dict[str, np.ndarray]:
    free = np.maximum(375 - height, 1), np.maximum(500 - width, 1)
    return {"area": height * width, "aspect": width / height, "top": top / free[0], "left": left / free[1]}


FAR = 0.05  # Kolmogorov-Smirnov, 3000 against 3000: chance exceeds it about once in a thousand


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.05, 0.14)])
def test_crops_follow_the_law_of_random_resized_crop(scale):
    row = draws(View(24, scale=scale))
    got = features(row["top"], row["left"], row["height"], row["width"])
    for name, expected in crops(scale, (3 / 4, 4 / 3)).items():
        assert ks_2samp(got[name], expected).statistic < FAR, name
    assert ks_2samp(got["area"], crops((0.8 * scale[0], 0.9 * scale[1]), (3 / 4, 4 / 3))["area"]).statistic > FAR
    assert ks_2samp(got["aspect"], crops(scale, (2 / 3, 3 / 2))["aspect"]).statistic > FAR


@pytest.mark.parametrize("shape", [(40, 300), (300, 40), (100, 110)])
def test_crop_that_never_fits_falls_back_to_the_centre(shape):
    image = torch.empty(3, *shape)
    expected = RandomResizedCrop.get_params(image, (1.0, 1.0), (1.3, 1.3))
    row = draws(View(24, scale=(1.0, 1.0), ratio=(1.3, 1.3)), 1, *shape)[0]
    assert [row[name] for name in ("top", "left", "height", "width")] == list(expected)


def test_jitter_factors_and_orders_follow_the_law_of_color_jitter():
    strengths = {"brightness": 0.4, "contrast": 1.2, "saturation": 0.2, "hue": 0.1}
    row = draws(View(24, jitter=Jitter(**strengths, p=1.0)))
    torch.manual_seed(0)
    law = ColorJitter(**strengths)
    params = [ColorJitter.get_params(law.brightness, law.contrast, law.saturation, law.hue) for _ in range(3000)]
    for k, name in enumerate(strengths, start=1):
        expected = np.array([p[k] for p in params])
        assert ks_2samp(row[name], expected).statistic < FAR, name
        assert ks_2samp(row[name], expected + 0.1 * strengths[name]).statistic > FAR, name
    _, counts = np.unique(row["order"], axis=0, return_counts=True)
    assert len(counts) == 24
    assert chisquare(counts).pvalue > 1e-3


def test_each_operation_applies_as_often_as_its_probability_says():
    view = View(24, flip=0.3, jitter=Jitter(0.4, p=0.8), gray=0.2, blur=Blur(0.6, (0.5, 1.5)), solarize=Solarize(0.1))
    row = draws(view, 20_000)
    rates = {
        0.3: row["flip"],
        0.8: row["brightness"] != 1,
        0.2: row["gray"],
        0.6: row["sigma"] > 0,
        0.1: row["solarize"],
    }
    for p, happened in rates.items():
        assert abs(np.mean(happened) - p) < 4 * (p * (1 - p) / 20_000) ** 0.5
    sigma = row["sigma"][row["sigma"] > 0]
    assert ks_2samp(sigma, np.linspace(0.5, 1.5, 10_000)).statistic < 0.02


def test_quantities_views_and_epochs_are_drawn_independently():
    view = View(24, scale=(0.1, 0.3), jitter=JITTER, gray=0.5, blur=Blur(1.0), solarize=Solarize(0.5))
    names = ["height", "brightness", "contrast", "saturation", "hue", "sigma", "flip", "gray", "solarize"]
    columns = []
    for epoch in (0, 1):
        for row in table([view, view], 0, epoch, np.arange(4000), 300, 300).T:
            columns += [row[name].astype(float) for name in names]
            columns += [row["top"] / (301 - row["height"]), row["left"] / (301 - row["width"])]
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 0.07  # 4.4 standard errors, over 946 pairs


# A pure function of (seed, epoch, index, view)


STACK = np.random.default_rng(1).integers(0, 256, (9, 33, 41, 3), dtype=np.uint8)
INDEX = np.array([7, 3, 10**12, 0, 5, 1, 2, 99, 4])


def test_batch_order_stacking_threads_and_buffers_change_no_bit():
    views = Views([RICH, View(16, count=2, jitter=JITTER)])
    whole = views(STACK, INDEX, 2)
    order = np.random.default_rng(0).permutation(9)
    alone = [views(STACK[b : b + 1], INDEX[b : b + 1], 2) for b in range(9)]
    buffers = views.buffers(12)
    with ThreadPoolExecutor(4) as pool:
        others = {
            "shuffled": [x[np.argsort(order)] for x in views(STACK[order], INDEX[order], 2)],
            "ragged": views(list(STACK), INDEX, 2),
            "threads": views(STACK, torch.from_numpy(INDEX), 2, pool=pool),
            "ragged threads": views(list(STACK), INDEX, 2, pool=pool),
            "alone": [torch.cat(x) for x in zip(*alone, strict=True)],
            "buffers": views(STACK, INDEX, 2, out=buffers),
        }
    for name, other in others.items():
        assert all(torch.equal(x, y) for x, y in zip(whole, other, strict=True)), name
    assert others["buffers"][0].data_ptr() == buffers[0].data_ptr()


def test_images_of_different_sizes_in_one_batch():
    images = [noise(30, 50), photo(), noise(9, 9), data.chelsea()]
    together = unit(RICH)(images, [0, 1, 2, 3], 0)[0]
    for b, image in enumerate(images):
        assert torch.equal(unit(RICH)([image], [b], 0)[0][0], together[b])


def test_seed_epoch_index_and_view_each_change_the_draw():
    views = Views([RICH, RICH], seed=4)
    same = np.stack([photo()] * 2)
    first, second = views(same, [0, 1], 0)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first, views(same, [0, 1], 1)[0])
    assert not torch.equal(first, Views([RICH], seed=5)(same, [0, 1], 0)[0])


def test_global_random_state_neither_matters_nor_moves():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    x = unit(RICH)(STACK, INDEX, 0)[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(unit(RICH)(STACK, INDEX, 0)[0], x)


def test_output_is_float32_and_channels_last_for_any_count():
    views = Views([RICH, View(16, count=2)])
    assert views.sizes == [24, 16, 16]
    for x, size in zip(views(STACK, INDEX, 0), views.sizes, strict=True):
        assert x.shape == (9, 3, size, size)
        assert x.dtype == torch.float32
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_images_may_be_read_only_or_strided():
    frozen = STACK.copy()
    frozen.flags.writeable = False
    expected = unit(RICH)(STACK, INDEX, 0)[0]
    assert torch.equal(unit(RICH)(frozen, INDEX, 0)[0], expected)
    strided = np.repeat(STACK, 2, axis=2)[:, :, ::2]
    assert torch.equal(unit(RICH)(strided, INDEX, 0)[0], expected)


def test_wrong_images_buffers_and_boxes_are_refused():
    views = unit(RICH)
    with pytest.raises(ValueError, match="uint8"):
        views(STACK.astype(np.float32), INDEX, 0)
    with pytest.raises(ValueError, match="uint8"):
        views([STACK[0, :, :, :1]], [0], 0)
    with pytest.raises(ValueError, match="channels_last"):
        views(STACK, INDEX, 0, out=[torch.empty(9, 3, 24, 24)])
    with pytest.raises(ValueError, match="longer"):
        views(STACK, INDEX, 0, out=views.buffers(8))
    rows = views.table(STACK, INDEX, 0)
    rows["left"] += 41
    with pytest.raises(ValueError, match="leaves its image"):
        views.render(STACK, rows)


# Clean


@pytest.mark.parametrize(
    ("image", "size", "resize"),
    [
        (photo(), 224, 256),
        (photo(), 32, 37),
        (data.chelsea(), 224, 256),
        (noise(47, 61), 32, 37),
        (noise(61, 60), 24, 27),
        (noise(47, 32), 32, 32),
        (noise(20, 30), 32, 32),
        (noise(31, 20), 32, 32),
    ],
)
@pytest.mark.parametrize("interpolation", MODES)
def test_clean_agrees_with_resize_and_centre_crop(image, size, resize, interpolation):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    x = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    x = F.resize(x, [resize], MODES[interpolation], antialias=True).clamp(0, 1)
    expected = F.normalize(F.center_crop(x, [size, size]), mean, std)
    got = Clean(size, mean, std, interpolation=interpolation)([image])
    assert (got[0] - expected).abs().max() < 0.02 * LEVEL / 0.2


def test_clean_only_normalises_an_image_of_its_size():
    got = Clean(32, (0, 0, 0), (1, 1, 1))(STACK[:, :32, :32])
    torch.testing.assert_close(got, torch.from_numpy(STACK[:, :32, :32]).permute(0, 3, 1, 2) / 255, rtol=0, atol=1e-6)


def test_clean_takes_buffers_pools_and_mixed_sizes():
    clean = Clean(16, resize=20)
    images = [noise(30, 50), noise(20, 20), photo()]
    expected = torch.cat([clean([image]) for image in images])
    out = clean.buffers(8)
    with ThreadPoolExecutor(2) as pool:
        assert torch.equal(clean(images, [0, 1, 2], 5, out=out, pool=pool), expected)
    assert torch.equal(out[:3], expected)


# Recipes


def recipe(name: str) -> list[View]:
    with initialize_config_dir(str(CONF), version_base=None):
        return parse(compose(overrides=[f"+views={name}", "+image_size=32", "+local_size=16"]).views)


FUSED = sorted(path.stem for path in (CONF / "views").glob("*.yaml") if "_target_" not in path.read_text())


@pytest.mark.parametrize("name", FUSED)
def test_recipe_parses(name):
    views = recipe(name)
    assert {view.size for view in views} <= {32, 16}
    assert (CONF / "views" / f"{name}.yaml").read_text().startswith("#")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("instdisc", [32]), ("moco_v2", [32] * 2), ("swav", [32] * 2 + [16] * 6), ("dino", [32] * 2 + [16] * 8)],
)
def test_recipe_makes_the_papers_crops(name, sizes):
    assert [view.size for view in recipe(name)] == sizes


def test_simsiam_takes_moco_v2s_views():
    assert recipe("simsiam") == recipe("moco_v2")


def test_parse_keeps_order_repeats_and_drops_none():
    config = {"b": {"size": 8, "count": 2}, "gone": None, "a": {"size": 4, "blur": {"p": 0.5, "sigma": [1, 2]}}}
    expected = [View(8), View(8), View(4, blur=Blur(0.5, (1, 2)))]
    assert parse(config) == expected
    assert parse(OmegaConf.create(config)) == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"a": {"size": 8, "crop": 1}}, r"views\.a: 'crop' is not a key of View; the keys are size, count"),
        ({"a": {"size": 8, "jitter": {"gamma": 1}}}, "'gamma' is not a key of Jitter"),
        ({"a": {"size": 8, "jitter": 0.4}}, "jitter is 0.4; give a mapping"),
        ({"a": {"flip": 0.5}}, "size"),
        ({"a": {"size": 8, "blur": {"sigma": [1, 2]}}}, "Blur could not be read"),
        ({"a": {"size": 8, "scale": [0.5, 0.2]}}, r"views\.a: scale is \(0.5, 0.2\)"),
        ({"a": None}, "views is empty"),
    ],
)
def test_parse_says_what_is_wrong_and_where(config, words):
    with pytest.raises(UserError, match=words):
        parse(config)


@pytest.mark.parametrize(
    "make",
    [
        lambda: View(0),
        lambda: View(8.5),
        lambda: View(8, count=0),
        lambda: View(8, scale=(0.5, 1.5)),
        lambda: View(8, scale=(0.0, 1.0)),
        lambda: View(8, ratio=(2, 1)),
        lambda: View(8, interpolation="nearest"),
        lambda: View(8, flip=1.1),
        lambda: View(8, gray=-0.1),
        lambda: View(8, blur=Blur(0.5, kernel=17)),
        lambda: Blur(0.5, kernel=4),
        lambda: Blur(2.0),
        lambda: Blur(0.5, sigma=(2.0, 1.0)),
        lambda: Jitter(brightness=-1),
        lambda: Jitter(hue=0.6),
        lambda: Jitter(p=1.5),
        lambda: Solarize(0.5, threshold=128),
        lambda: Clean(32, resize=16),
    ],
)
def test_bad_spec_is_the_users_error(make):
    with pytest.raises(UserError, match=" is "):
        make()


# Stateless integers and permutations


def test_integers_are_uniform_and_independent_between_steps_rows_and_columns():
    index = torch.arange(500)
    steps = torch.stack([integers(0, step, index, 100, 16) for step in range(4)])
    assert steps.min() == 0
    assert steps.max() == 15
    for drawn in steps:
        assert chisquare(np.bincount(drawn.flatten(), minlength=16)).pvalue > 1e-3
    pairs = [(steps[0], steps[1]), (steps[0, 1:], steps[0, :-1]), (steps[0, :, 1:], steps[0, :, :-1])]
    for a, b in pairs:
        assert chisquare(np.bincount((16 * a + b).flatten(), minlength=256)).pvalue > 1e-3


def test_integers_of_a_row_depend_on_seed_step_and_index_alone():
    index = torch.tensor([4, 10**12, 0, 4])
    drawn = integers(1, 2, index, 8, 10**9)
    assert torch.equal(drawn[0], drawn[3])
    assert torch.equal(integers(1, 2, index[1:2], 8, 10**9), drawn[1:2])
    assert torch.equal(integers(1, 2, index, 5, 10**9), drawn[:, :5])
    for other in (integers(0, 2, index, 8, 10**9), integers(1, 3, index, 8, 10**9)):
        assert (other != drawn).all()


def test_permutation_is_a_permutation_that_changes_with_step_and_seed():
    first = permutation(0, 0, 64)
    assert torch.equal(first.sort().values, torch.arange(64))
    assert torch.equal(permutation(0, 0, 64), first)
    assert not torch.equal(permutation(0, 1, 64), first)
    assert not torch.equal(permutation(1, 0, 64), first)


DIGEST = """
import hashlib
import numpy as np
from sslzoo.views import Blur, Jitter, View, Views
recipe = View(16, count=2, jitter=Jitter(0.4, 0.4, 0.4, 0.1), gray=0.2, blur=Blur(0.5))
images = np.random.default_rng(0).integers(0, 256, (32, 40, 40, 3), dtype=np.uint8)
print(hashlib.sha256(b"".join(v.numpy().tobytes() for v in Views([recipe])(images, np.arange(32), 0))).hexdigest())
"""


@pytest.mark.slow
def test_kernel_just_compiled_and_from_the_cache_agree_to_the_bit(tmp_path):
    """A run that compiled it, killed and resumed by one that did not, would end with other weights."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", DIGEST]
    compiled, loaded = (subprocess.check_output(command, env=environment, text=True) for _ in range(2))
    assert any(tmp_path.rglob("kernel.render*.nbc"))
    assert compiled == loaded
