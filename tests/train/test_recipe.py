"""Recipes: published values, fields that are checked, JSON, TOML and the flat form of version 0.1."""

import json

import pytest

from tests.train.helpers import OLD_RECIPE
from twins_fast.methods import AT, TRADES, TwinsAT, TwinsTRADES
from twins_fast.train.config_file import read_recipe, recipe_as_toml
from twins_fast.train.recipe import Attack, Data, Evaluation, Network, Optimizer, Recipe, RecipeError, Run
from twins_fast.train.recipes import RECIPES, get_recipe


def test_published_hyper_parameters():
    cifar, caltech = RECIPES["cifar10"], RECIPES["caltech256"]
    assert cifar.method == TwinsAT(frozen_weight=1.0) and caltech.method == TwinsAT(frozen_weight=0.4)
    assert (cifar.optimizer.weight_decay, cifar.network.upsample) == (1e-5, 224)
    assert (caltech.optimizer.weight_decay, caltech.network.upsample) == (1e-3, None)
    for name in ("cifar10", "cifar100", "caltech256", "cub200", "stanford-dogs"):
        recipe, optimizer = RECIPES[name], RECIPES[name].optimizer
        assert (recipe.data.batch_size, optimizer.epochs, optimizer.milestones) == (128, 60, (30, 50))
        assert (optimizer.lr, optimizer.momentum, optimizer.gamma) == (3e-3, 0.9, 0.1)
        assert (recipe.attack.eps, recipe.attack.alpha, recipe.attack.steps) == (8 / 255, 2 / 255, 10)
        assert (recipe.evaluation.alpha, recipe.evaluation.steps) == (2 / 255, 10)


def test_recipes_survive_json_and_toml(tmp_path):
    odd = get_recipe(
        "mini",
        method={"name": "twins-trades", "beta": 1 / 3},
        attack={"eps": 0.031, "alpha": 1e-3},
        network={"checkpoint": 'a "quoted" \\ file €.ckpt'},
    )
    for recipe in (*RECIPES.values(), odd):
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
        path = tmp_path / "recipe.toml"
        path.write_text(recipe_as_toml(recipe), encoding="utf-8")
        assert read_recipe(path) == recipe


def test_a_short_toml_file_takes_the_published_values(tmp_path):
    path = tmp_path / "birds.toml"
    path.write_text(
        'method.name = "trades"\nmethod.beta = 4\n[data]\ndataset = "folder"\n'
        '[attack]\neps = "4/255"\n[network]\nupsample = "none"\n[optimizer]\nmilestones = [5]\n'
    )
    expected = Recipe("birds", Data("folder"), TRADES(beta=4), attack=Attack(eps=4 / 255))
    assert read_recipe(path) == expected.replaced(optimizer={"milestones": (5,)})


def test_files_that_are_no_recipes(tmp_path):
    path = tmp_path / "x.toml"
    for text, message in (
        ("a = [", "x.toml' is not a TOML file"),
        ("", "lacks data.dataset"),
        ("data = 3", "data must be a table of fields, got 3"),
        (
            '[data]\ndataset = "npz"\n[optimiser]\nlr = 1',
            "unknown recipe sections: optimiser; choose from",
        ),
        ('[data]\ndataset = "npz"\n[attack]\nepsilon = 1', "unknown attack fields: epsilon; choose from norm, eps"),
        ('[data]\ndataset = "npz"\n[attack]\neps = "8/x"', "attack: '8/x' is not a number or fraction"),
        ('[data]\ndataset = "npz"\n[optimizer]\nlr = true', "lr must be a finite number >= 0, got True"),
        (
            '[data]\ndataset = "npz"\n[optimizer]\nmilestones = 3',
            "milestones must be a list (in Python a tuple), got 3",
        ),
        ('method = "fat"\n[data]\ndataset = "npz"', "unknown method 'fat'; choose from adversarial-linear-probe"),
        ('method = {name = "at", beta = 3}\n[data]\ndataset = "npz"', "unknown method fields: beta"),
        ("method = 3\n[data]\ndataset = 'npz'", "method must be a name or a table of fields, got 3"),
        ("dataset = 'npz'\nlr = 1\n[optimizer]\nepochs = 3", "unknown recipe sections: dataset, lr"),
        ('method = {name = ["at"]}\n[data]\ndataset = "npz"', "unknown method ['at']"),
        ("name = 3\n[data]\ndataset = 'npz'", "the name of a recipe must be a string, got 3"),
    ):
        path.write_text(text)
        with pytest.raises(RecipeError) as error:
            read_recipe(path)
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        (Data, {"dataset": "imagenet"}, "unknown dataset 'imagenet'; choose from aircraft"),
        (Data, {"dataset": "npz", "batch_size": 1}, "batch_size must be at least 2, got 1"),
        (Data, {"dataset": "npz", "classes": ["cat"]}, "classes must be a list .in Python a tuple., got"),
        (Network, {"arch": "resnet51"}, "unknown arch 'resnet51'"),
        (Network, {"upsample": 0}, "upsample must be at least 1, got 0"),
        (Network, {"channels_last": 1}, "channels_last must be of type bool, got 1"),
        (Attack, {"eps": float("nan")}, "eps must be a finite number >= 0, got nan"),
        (Attack, {"eps": 8}, "eps must be at most 1, as images are in .0, 1., got 8; did you mean 8/255?"),
        (Attack, {"steps": 2.5}, "steps must be an integer, got 2.5"),
        (Attack, {"norm": "l0"}, "unknown norm 'l0'"),
        (Optimizer, {"epochs": 0}, "epochs must be at least 1, got 0"),
        (Optimizer, {"warmup": 1.0}, r"warmup must be in \(0, 1\), got 1.0"),
        (Evaluation, {"validation_part": 1.0}, r"validation_part must be in \(0, 1\), got 1.0"),
        (Evaluation, {"every": 0}, "every must be at least 1, got 0"),
        (Run, {"seed": 2**63}, r"seed must be less than 2\*\*63"),
        (Run, {"amp": "fp8"}, "unknown amp 'fp8'"),
        (Run, {"baselines": ("at", "at")}, "baselines must name each method once, got at, at"),
        (Run, {"baselines": ("fat",)}, "unknown method 'fat'"),
    ],
)
def test_fields_are_checked(section, fields, message):
    with pytest.raises(ValueError, match=message):
        section(**fields)


def test_replaced_fields():
    recipe = get_recipe("caltech256", method="twins-trades", optimizer={"lr": 1e-2})
    assert recipe.method == TwinsTRADES(frozen_weight=0.4) and recipe.optimizer.lr == 1e-2
    assert recipe.replaced(method={"beta": 2}).method == TwinsTRADES(frozen_weight=0.4, beta=2)
    assert recipe.replaced(method={"beta": 2}).replaced(method="at").method == AT()
    with pytest.raises(RecipeError, match="recipe 'caltech256': optimizer: 'x' is not a number or fraction"):
        recipe.replaced(optimizer={"lr": "x"})


def test_the_flat_form_of_version_0_1_is_read():
    assert Recipe.from_dict(OLD_RECIPE | {"arch": "resnet18"}) == Recipe(
        "mini-pretrain",
        Data("npz", batch_size=8, workers=0),
        TwinsTRADES(adversary="trades", frozen_weight=0.4, beta=5.0),
        Network("resnet18", checkpoint="none", channels_last=True),
        Attack(alpha=4 / 255, steps=2),
        Optimizer(epochs=2, lr=0.05, weight_decay=5e-4, milestones=(1,)),
        evaluation=Evaluation(steps=2, choose_on="test"),
        run=Run(baselines=("trades",)),
    )
    with pytest.raises(RecipeError, match="unknown recipe sections: colour"):
        Recipe.from_dict(OLD_RECIPE | {"colour": 1})
