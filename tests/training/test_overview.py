"""Claims about what a run prints before and during its first steps."""

import logging

from tiny import make_dataset


def test_a_run_prints_its_size_and_estimates_its_time(finetune, caplog):
    caplog.set_level(logging.INFO, "ddgan")
    finetune("run", "--max_train_steps", 12, "--grad_accumulation_steps", 2, "--batch_size", 4)
    opening = (
        "Training on 13 images: 12 steps (6 epochs of 2), global batch size 8 (4 per micro-batch x 2 accumulated)."
    )
    (message,) = [message for message in caplog.messages if message.startswith(opening)]
    assert "45,259 parameters are trained, on CPU" in message and message.endswith("in fp32.")
    (estimate,) = [message for message in caplog.messages if "remaining steps" in message]
    assert estimate.endswith("seconds, without sample grids and saves.")


def test_frozen_parameters_and_streams_are_named(finetune, tmp_path, caplog):
    caplog.set_level(logging.INFO, "ddgan")
    data = make_dataset(tmp_path / "stream", 13)
    flags = ["--dataset_name", data, "--streaming", "--max_train_steps", 1, "--freeze", "all_but_attention"]
    finetune("run", "--mixed_precision", "bf16", *flags)
    assert any("a stream of images: 1 steps" in m and "4,480 of 45,259" in m for m in caplog.messages)
    assert any(message.startswith("On most CPUs bf16 trains several times slower") for message in caplog.messages)
