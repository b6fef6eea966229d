"""examples/notebook.py, cell by cell, at a tiny size."""

import json

from tiny import ROOT

SOURCE = ROOT / "examples" / "notebook.py"
SMALL = {  # setting -> a small value
    'EXAMPLES / "models" / "noto-emoji-32"': "{model!r}",
    "STEPS = 100": "STEPS = 2",
    "SAMPLING_STEPS = 20": "SAMPLING_STEPS = 2",
    "NUM_IMAGES = 16": "NUM_IMAGES = 12",
}


def test_the_cells_run(tiny_model, tmp_path, monkeypatch):
    source = SOURCE.read_text()
    for setting, small in SMALL.items():
        assert source.count(setting) == 1
        source = source.replace(setting, small.format(model=str(tiny_model)))
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in source.split("# %%\n"):
        exec(cell, names)
    assert len(names["run"].metrics) == 2
    assert [image.size for image in names["samples"]] == [(8, 8)] * 12
    assert (
        names["results"].metrics.keys()
        == json.loads((tmp_path / "notebook-evaluation.json").read_text())["metrics"].keys()
    )
