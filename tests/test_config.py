"""Composition: what wins over what, what is refused, what makes two runs the same."""

import pytest
from omegaconf import OmegaConf

from sslzoo.blocks import Encoder, LabEncoder
from sslzoo.config import (
    CONF,
    build_encoder,
    build_optim,
    built,
    composed,
    config_hash,
    differences,
    keys_of,
    options,
    plain,
    tuned,
)
from sslzoo.errors import UserError
from sslzoo.optim import Optim


def refusal(*overrides) -> str:
    with pytest.raises(UserError) as error:
        composed(overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# What wins


def test_a_scale_wins_over_the_recipe_tuning_over_the_scale_and_typing_over_all():
    recipe, scale = (OmegaConf.load(CONF / name) for name in ("method/moco.yaml", "scale/demo.yaml"))
    settings = OmegaConf.load(CONF / "tuned/demo/moco.yaml")
    config = composed(["method=moco", "scale=demo"])
    assert config.trainer.max_epochs == scale.trainer.max_epochs != recipe.trainer.max_epochs
    assert config.method.queue_size == settings["method.queue_size"] != recipe.method.queue_size
    assert config.optim.lr == settings["optim.lr"] != recipe.optim.lr
    typed = composed(["method=moco", "scale=demo", "method.queue_size=99", "trainer.max_epochs=7"])
    assert (typed.method.queue_size, typed.trainer.max_epochs) == (99, 7)
    assert typed.optim.lr == settings["optim.lr"]


def test_the_papers_scale_leaves_the_recipe_as_it_is():
    recipe, config = OmegaConf.load(CONF / "method/moco.yaml"), composed(["method=moco", "scale=imagenet"])
    for group in ("method", "optim", "trainer"):
        for key, value in recipe[group].items():
            assert config[group][key] == value, f"{group}.{key}"
    assert tuned(["method=moco", "scale=imagenet"]) == []


def test_what_no_recipe_says_is_the_optimizers_own_default():
    config = composed(["method=moco", "scale=imagenet"])
    assert config.optim.lr_scaling == Optim().lr_scaling
    assert set(config.optim) == set(Optim.__dataclass_fields__)


def test_tuning_is_of_the_default_scale_and_method_where_none_is_typed():
    assert tuned([]) == tuned(["scale=demo", "method=moco"]) != []
    assert tuned(["method=moco"]) != tuned(["method=simclr"])
    assert not [word for word in tuned(["views=moco_v2", "optim.lr=1"]) if word.startswith(("views=", "optim.lr="))]


@pytest.mark.parametrize(("method", "views"), [("instdisc", "single"), ("swav", "byol"), ("dino", "dino")])
def test_typed_views_come_as_they_are_without_what_tuning_changes_in_its_own(method, views):
    typed, alone = composed([f"method={method}", f"views={views}"]), composed([f"views={views}"])
    assert typed.views.keys() == alone.views.keys()
    for name, view in alone.views.items():
        assert {**typed.views[name], "size": 0} == {**view, "size": 0}, name  # sizes are the scale's


@pytest.mark.parametrize("path", sorted((CONF / "tuned").rglob("*.yaml")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_tuned_setting_arrives(path):
    config = composed([f"method={path.stem}", f"scale={path.parent.name}"])
    for key, value in OmegaConf.load(path).items():
        if not (CONF / key).is_dir():
            found = OmegaConf.select(config, key)
            assert found == value or plain(found) == value, key


def test_composing_twice_is_composing_once():
    first, _, again = composed(["seed=1"]), composed(["method=moco_v2", "seed=2"]), composed(["seed=1"])
    assert first == again


# What is refused


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["method=mocco"], "did you mean moco?"),
        (["method=zzz"], f"method is one of {', '.join(options('method'))}"),
        (["temperature=0.1"], "temperature is no setting; the configuration has seed, "),
        (["method.nonsense=1"], "method.nonsense is no setting; method has dim, layers, queue_size"),
        (["views.full.jitter.gamma=1"], "views.full.jitter.gamma is no setting; views.full.jitter has "),
        (["optim.nonsense=1"], "optim.nonsense is no setting; optim has name, lr"),
        (["optim.lr=[1,2]"], "optim.lr=[1,2]"),
        (["seed=0,1"], "seed"),
        (["seed=[1"], "[1"),
        (["method="], "moco_v2"),
        (["seed"], "'seed' is no override: write key=value"),
        (["method.dim=${nonsense}"], "nonsense"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_what_there_is(overrides, told):
    assert told in refusal(*overrides)


def test_keys_that_start_with_an_underscore_are_not_offered():
    assert "_target_" not in refusal("method.nonsense=1")


def test_of_several_overrides_the_wrong_one_is_named():
    assert "optim.rate is no setting" in refusal("method=moco_v2", "seed=3", "optim.rate=1", "method.dim=64")


# What makes two runs the same


def test_keys_are_dotted_leaves_with_lists_kept_whole():
    config = OmegaConf.create({"a": {"b": 1, "c": {"d": [1, {"x": 2}]}}, "e": None, "f": "${a.b}"})
    assert keys_of(config) == {"a.b": 1, "a.c.d": [1, {"x": 2}], "e": None, "f": 1}


@pytest.mark.parametrize(
    ("override", "computes_the_same"),
    [
        ("data.workers=3", True),
        ("data.root=/elsewhere", True),
        ("run_dir=/tmp/x", True),
        ("trainer.devices=2", True),
        ("trainer.accelerator=cpu", True),
        ("logger=tensorboard", True),
        ("monitor.every_epochs=3", True),
        ("checkpoint.minutes=1", True),
        ("seed=1", False),
        ("optim.lr=0.5", False),
        ("trainer.max_epochs=3", False),
        ("trainer.precision=32-true", False),
        ("data.batch_size=64", False),
        ("encoder.width=0.5", False),
        ("image_size=48", False),
        ("views=simclr", False),
        ("method=moco_v2", False),
    ],
)
def test_hash_and_differences_agree_on_what_is_another_run(override, computes_the_same):
    base, other = composed(["method=moco"]), composed([override])
    assert (config_hash(base) == config_hash(other)) == computes_the_same
    found = list(differences(base, other))
    assert (not found) == computes_the_same
    key = override.partition("=")[0]
    if not computes_the_same and not (CONF / key).is_dir():
        assert found[0][0] == key
        assert found[0][1:] == (OmegaConf.select(base, key), OmegaConf.select(other, key))


def test_another_recipe_is_the_first_difference():
    first, *_ = differences(composed(["method=moco"]), composed(["method=moco_v2"]))
    assert first == ("recipe", "moco", "moco_v2")


def test_a_key_that_only_one_side_has_is_a_difference():
    a, b = OmegaConf.create({"x": 1}), OmegaConf.create({"x": 1, "y": 2})
    assert list(differences(a, b)) == [("y", None, 2)]
    assert list(differences(b, a)) == [("y", 2, None)]


# What is built


def test_built_makes_the_named_class_from_plain_values():
    node = OmegaConf.create({"_target_": "sslzoo.optim.Optim", "lr": 0.5, "milestones": [0.1, "${x}"], "x": 0.2})
    del node.x
    node.milestones = [0.1, 0.2]
    found = built(node, "optim", batch_size=64)
    assert (found.lr, found.milestones, found.batch_size) == (0.5, [0.1, 0.2], 64)
    assert type(found.milestones) is list
    assert "_target_" in node  # the configuration is left as it was


@pytest.mark.parametrize(
    ("node", "told"),
    [
        ({"nonsense": 1}, "optim cannot be built from its settings: .*'nonsense'"),
        ({"batch_size": 1}, None),
    ],
)
def test_settings_that_are_no_arguments_are_the_users_error(node, told):
    if told is None:
        assert built(OmegaConf.create(node), "optim", Optim, batch_size=8).batch_size == 8  # given ones win
        return
    with pytest.raises(UserError, match=told):
        built(OmegaConf.create(node), "optim", Optim)


def test_a_missing_argument_is_the_users_error():
    with pytest.raises(UserError, match=r"memory cannot be built from its settings: .*'dim'"):
        built(OmegaConf.create({"_target_": "sslzoo.memory.Queue", "size": 3}), "memory")


def test_the_optimizers_batch_is_the_global_one_over_accumulated_parts():
    config = composed(["data.batch_size=64", "trainer.accumulate_grad_batches=4", "optim.lr=0.1", "optim.lr_per=256"])
    assert build_optim(config).batch_size == 256
    assert build_optim(config).peak_lr == pytest.approx(0.1)


def test_the_encoder_is_the_one_named_or_the_plain_one():
    config = composed(["method=moco", "encoder.width=0.125", "encoder.stem=small"])
    encoder = build_encoder(config)
    assert type(encoder) is Encoder
    assert encoder.config["width"] == 0.125
    assert type(build_encoder(composed(["method=cmc"]))) is LabEncoder
