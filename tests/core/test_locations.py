"""Names of repositories on the Hub are refused at once where they cannot be looked up."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from ddgan.commands.arguments import EvaluateArguments, FewStepArguments, GenerateArguments
from ddgan.core.errors import InputError
from ddgan.data.sources import open_source
from ddgan.guidance.clip import load_encoder
from ddgan.sampling.loading import load_pipeline
from ddgan.training.arguments import DataArguments


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        (GenerateArguments, "pipeline", {}),
        (FewStepArguments, "start_model", {}),
        (DataArguments, "dataset_name", {}),
        (EvaluateArguments, "reference", {"images": "."}),
    ],
)
def test_a_repository_that_is_not_cached_is_refused_in_offline_mode(tmp_path, monkeypatch, kind, name, values):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=rf"--{name} ann/it: .* not contacted because HF_HUB_OFFLINE is set"):
        kind(**{name: "ann/it"}, **values)
    repo_type = "datasets" if name in ("dataset_name", "reference") else "models"
    Path(tmp_path, f"{repo_type}--ann--it").mkdir()
    kind(**{name: "ann/it"}, **values)


@pytest.mark.parametrize("load", [load_pipeline, open_source, lambda name: load_encoder(name, None, "cpu")])
def test_a_hub_that_cannot_be_reached_is_asked_once(local_hub, monkeypatch, load):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("the client waits before it tries again"))
    local_hub.stop()
    with pytest.raises(InputError, match=rf"ann/it.* Hub \({local_hub.url}\) cannot be reached \(.*refused"):
        load("ann/it")
