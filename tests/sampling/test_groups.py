"""Groups of seeds: an image depends only on its seed, whatever else is generated with it."""

import numpy as np
import pytest
import torch
from diffusers import LDMPipeline, VQModel
from tiny import ROOT, level_difference, tiny_pipeline, tiny_unet
from tiny_clip import save_clip

from ddgan import CLIPLoss, ColorLoss, GuidedPipeline, SaturationLoss, SymmetryLoss, TotalVariationLoss
from ddgan.pipelines.pipeline_class_conditional import count_classes
from ddgan.sampling.groups import GroupSampler, group_size, split_into_groups
from ddgan.sampling.loading import load_pipeline, with_scheduler

MODELS = sorted(index.parent for index in (ROOT / "examples" / "models").glob("*/model_index.json"))


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to memory that starts at an odd multiple of its element size."""
    copy = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view_as(tensor)
    return copy.copy_(tensor)


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_a_row_of_a_batch_does_not_depend_on_the_other_rows(folder):
    """Bit-identical on one thread, whatever the kernels do with a batch of this size."""
    pipe = load_pipeline(str(folder))
    unet, config, size = pipe.unet, pipe.unet.config, group_size(pipe, 1)
    assert size >= 16
    shapes = {"sample": (config.in_channels, config.sample_size, config.sample_size)}
    if config.get("latent_dim"):
        shapes["z"] = (config.latent_dim,)

    def inputs(seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: torch.randn(size, *shape, generator=generator) for name, shape in shapes.items()}
        if classes := count_classes(unet):
            tensors["class_labels"] = torch.randint(classes, (size,), generator=generator)
        return tensors

    @torch.no_grad()
    def output(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        tensors = dict(tensors)
        return unet(tensors.pop("sample"), torch.tensor(3), **tensors).sample

    batch = inputs(0)
    expected = output(batch)
    for rows, fill in ((slice(0, 5), 1e3), (slice(size - 3, size), torch.nan)):
        other = inputs(1)
        for name, tensor in other.items():
            if tensor.is_floating_point():
                tensor *= fill
            tensor[rows] = batch[name][rows]
        assert torch.equal(output({name: unaligned(tensor) for name, tensor in other.items()})[rows], expected[rows])


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> CLIPLoss:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "clip"
    save_clip(folder)
    return CLIPLoss(["a rose", "red"], str(folder), device="cpu")


@pytest.mark.parametrize("gradient", ["sample", "model"])
def test_guidance_of_an_image_does_not_depend_on_the_other_images(clip, gradient):
    pipe = GuidedPipeline.from_pipe(load_pipeline(str(ROOT / "examples" / "models" / "noto-emoji-32")))
    pipe.set_progress_bar_config(disable=True)
    loss = clip + ColorLoss("teal") + SaturationLoss() + TotalVariationLoss() + SymmetryLoss()

    def guided(seeds: list[int]) -> torch.Tensor:
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"num_inference_steps": 2, "max_grad_norm": 0.5, "gradient": gradient, "output_type": "latent"}
        return pipe(loss, 40.0, batch_size=len(seeds), generator=generator, **options).images

    one, two = guided([10, 11, 12, 13]), guided([20, 11, 22, 13])
    assert torch.equal(one[1], two[1]) and torch.equal(one[3], two[3])
    assert not torch.equal(one[0], two[0])


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [("ddpm", {}), ("dpmsolver", {"loss": ColorLoss("teal"), "guidance_scale": 20.0, "gradient": "model"})],
)
def test_an_image_depends_only_on_its_seed(scheduler, options):
    pipe = with_scheduler(tiny_pipeline(), scheduler)
    if options:
        pipe = GuidedPipeline.from_pipe(pipe)
        pipe.set_progress_bar_config(disable=True)
    whole = GroupSampler(pipe, 4, 0, 3, options=options)
    expected = [np.asarray(image) for group in split_into_groups(12, 4) for image in whole(group)]
    assert len({image.tobytes() for image in expected}) == 12
    later = GroupSampler(pipe, 4, 5, 3, options=options)
    assert later.offset == 1
    for indices in ([0, 2], [1], [3, 4, 5, 6]):
        for i, image in zip(indices, later(indices), strict=True):
            assert np.array_equal(np.asarray(image), expected[5 + i])


def test_classes_are_counted_from_image_0():
    pipe = tiny_pipeline(num_class_embeds=3)
    torch.nn.init.normal_(pipe.unet.class_embedding.weight, std=20)
    turn, two = (GroupSampler(pipe, 4, 6, 3, classes) for classes in ([0, 2, 1], [2]))
    same = [level_difference(a, b) == 0 for a, b in zip(turn([2, 3, 4, 5]), two([2, 3, 4, 5]), strict=True)]
    assert [turn.class_label(i) for i in range(6)] == [0, 2, 1, 0, 2, 1]
    assert same == [False, False, True, False]


def test_groups_are_aligned():
    assert split_into_groups(10, 4) == [range(0, 4), range(4, 8), range(8, 10)]
    assert split_into_groups(10, 4, 3) == [range(0, 1), range(1, 5), range(5, 9), range(9, 10)]
    assert split_into_groups(2, 8, 3) == [range(0, 2)]


@pytest.mark.parametrize(
    ("sample_size", "size"), [(8, 32), (28, 16), (32, 16), ((32, 64), 8), (64, 4), (100, 1), (256, 1)]
)
def test_the_size_of_a_group_depends_on_that_of_the_images(sample_size, size):
    pipe = tiny_pipeline(sample_size=sample_size)
    assert group_size(pipe, 5) == size


def test_pipelines_with_a_decoder_generate_one_image_at_a_time():
    decoder = VQModel(block_out_channels=(8,), norm_num_groups=4)
    pipe = tiny_pipeline()
    assert group_size(LDMPipeline(decoder, tiny_unet(), pipe.scheduler), 5) == 1


def test_on_an_accelerator_a_group_is_a_batch():
    assert group_size(tiny_pipeline().to("meta"), 5) == 5
