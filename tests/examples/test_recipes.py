"""Every recipe is accepted by the script that it is for, and sets what it says."""

import pytest
from tiny import ROOT

from ddgan import finetune_few_step, finetune_model, train_class_conditional, train_ddgan

EXAMPLES = ROOT / "examples"
RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))
SCRIPTS = {
    "class_conditional": (train_class_conditional, "train_class_conditional"),
    "ddgan": (train_ddgan, "train_ddgan"),
    "few_step": (finetune_few_step, "finetune_few_step"),
}


class Started(Exception):
    """The script has read its arguments, which are those of this exception."""


@pytest.fixture
def read(monkeypatch):
    """Return a function that calls a script with flags and returns the arguments that it would train with."""

    def read(module, function: str, *flags) -> dict:
        def train(*arguments):
            raise Started(*arguments)

        monkeypatch.setattr(module, function, train)
        with pytest.raises(Started) as started:
            module.main([str(flag) for flag in flags])
        return {name: value for part in started.value.args for name, value in vars(part).items()}

    return read


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_is_accepted_by_its_script(read, recipe):
    (script,) = (script for name, script in SCRIPTS.items() if recipe.name.startswith(f"{name}_"))
    assert read(*script, "--config", recipe)["batch_size"] > 0


def test_the_few_step_demo_starts_from_the_result_of_the_demo(read):
    demo = read(finetune_model, "finetune", "--resume_from_checkpoint", "latest")
    few_step = read(*SCRIPTS["few_step"], "--config", EXAMPLES / "recipes" / "few_step_demo.yaml")
    assert few_step["start_model"] == demo["output_dir"]
    assert few_step["num_samples"] == demo["num_samples"] and few_step["seed"] == demo["seed"]
    makefile = (ROOT / "Makefile").read_text()
    target = makefile.partition("\ndemo-few-step: demo")[2].partition("\n\n")[0]
    assert "finetune_few_step.py --config examples/recipes/few_step_demo.yaml" in target
    assert few_step["output_dir"] in makefile.partition("\nclean:")[2]
