"""Every recipe is accepted by the script that it is for, and sets what it says."""

from types import ModuleType

import pytest
from huggingface_hub import constants
from tiny import ROOT

from ddgan import finetune_few_step, finetune_model, train_class_conditional, train_ddgan

EXAMPLES = ROOT / "examples"
RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))
SCRIPTS = {"class_conditional": train_class_conditional, "ddgan": train_ddgan, "few_step": finetune_few_step}


def read(script: ModuleType, *flags) -> dict:
    """Return the arguments that a script would train with."""
    return {name: value for part in script.parse([str(flag) for flag in flags]) for name, value in vars(part).items()}


@pytest.fixture(autouse=True)
def after_the_demo(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the recipes name models and datasets of the Hub


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_is_accepted_by_its_script(recipe):
    (script,) = (script for name, script in SCRIPTS.items() if recipe.name.startswith(f"{name}_"))
    assert read(script, "--config", recipe)["batch_size"] > 0


def test_the_few_step_demo_starts_from_the_result_of_the_demo():
    demo = read(finetune_model, "--resume_from_checkpoint", "latest")
    few_step = read(finetune_few_step, "--config", EXAMPLES / "recipes" / "few_step_demo.yaml")
    assert few_step["start_model"] == demo["output_dir"]
    assert few_step["num_samples"] == demo["num_samples"] and few_step["seed"] == demo["seed"]
    makefile = (ROOT / "Makefile").read_text()
    target = makefile.partition("\ndemo-few-step: demo")[2].partition("\n\n")[0]
    assert "ddgan few-step --config examples/recipes/few_step_demo.yaml" in target
    assert few_step["output_dir"] in makefile.partition("\nclean:")[2]
