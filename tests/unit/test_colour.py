"""Colour jitter as a matrix an image, and its one pass together with normalisation."""

import shutil

import numpy as np
import pytest
import torch
from torch._inductor import metrics
from torchvision.transforms import functional as reference

from visionmtl.ops.color import apply_matrices, color_matrix, normalise


def test_colour_factors_mean_what_torchvision_means():
    pixels = torch.randint(60, 190, (3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    mean = tuple(pixels.mean((1, 2)).tolist())

    def ours(**factors: float) -> torch.Tensor:
        return apply_matrices(pixels[None], torch.from_numpy(color_matrix(mean_rgb=mean, **factors))[None])[0]

    tolerance = {"atol": 0.1, "rtol": 0}  # torchvision rounds the luma weights to four digits
    torch.testing.assert_close(ours(), pixels, atol=1e-3, rtol=0)
    for name in ("brightness", "contrast", "saturation"):
        expected = getattr(reference, f"adjust_{name}")(pixels / 255, 1.2) * 255
        torch.testing.assert_close(ours(**{name: 1.2}), expected, **tolerance)
    both = reference.adjust_contrast(reference.adjust_brightness(pixels / 255, 0.8), 1.2) * 255
    torch.testing.assert_close(ours(brightness=0.8, contrast=1.2), both, **tolerance)


def test_hue_turns_colours_at_equal_luma_and_leaves_grey_alone():
    matrix = torch.from_numpy(color_matrix(hue_turns=0.1))
    luma = torch.tensor([0.299, 0.587, 0.114])
    colour = torch.tensor([150.0, 100.0, 90.0])

    torch.testing.assert_close(matrix[:, :3].sum(1), torch.ones(3), atol=1e-4, rtol=0)
    turned = matrix[:, :3] @ colour
    torch.testing.assert_close(luma @ turned, luma @ colour, atol=1e-3, rtol=0)
    assert (turned - colour).abs().max() > 5


def test_each_image_gets_its_own_matrix_in_full_precision_under_autocast():
    image = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 1, 1)  # [2, 3, 1, 256]
    matrices = torch.from_numpy(np.stack([color_matrix(), color_matrix(brightness=2.0)]))
    with torch.autocast("cpu", torch.bfloat16):
        out = apply_matrices(image, matrices)

    assert out.dtype == torch.float32
    torch.testing.assert_close(out[0], image[0].float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(out[1], (2 * image[1].float()).clamp(max=255), atol=1e-3, rtol=0)


def colour_pass() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two images as the network gets them, mean, standard deviation and colour matrices."""
    image = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([120.0, 115.0, 100.0]).view(1, 3, 1, 1), torch.tensor([58.0, 57.0, 56.0]).view(1, 3, 1, 1)
    matrices = np.stack([color_matrix(brightness=1.8, contrast=0.6), color_matrix(saturation=0.2, hue_turns=0.1)])
    return image.contiguous(memory_format=torch.channels_last), mean, std, torch.from_numpy(matrices)


def test_colours_and_normalisation_together_are_the_one_after_the_other():
    image, mean, std, matrices = colour_pass()
    out = normalise(image, mean, std, matrices)
    torch.testing.assert_close(out, (apply_matrices(image, matrices) - mean) / std, rtol=1e-5, atol=1e-5)
    assert ((out == -mean / std) | (out == (255 - mean) / std)).any(), "nothing reached the ends of the range"
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_colours_normalisation_and_rounding_are_one_pass_over_the_pixels():
    def passed_on(*inputs: torch.Tensor) -> torch.Tensor:
        return normalise(*inputs).to(torch.bfloat16)

    metrics.reset()
    out = torch.compile(passed_on, fullgraph=True, dynamic=False)(*colour_pass())
    assert metrics.generated_kernel_count == 1
    torch.testing.assert_close(out, passed_on(*colour_pass()))
