"""JPEGs decoded, cropped and resized on the device, to the views that loader workers would have made of them.

The resizing is that of `CropResize.image`, and squares of pixels are averaged where a worker would have a JPEG decoded at
a fraction of its size. On photographs of COCO and NYUv2 decoded by libjpeg-turbo the views differ from the workers' by
0.2 to 0.4 grey levels in the mean over images, 0.72 in the worst. nvJPEG, which decodes on CUDA devices, may round and
interpolate colours otherwise.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from visionmtl.data.transforms.crop_resize import CropResize, Size
from visionmtl.datasets import NamedDataset
from visionmtl.ops.color import GREY
from visionmtl.structures import Encoded, Jpeg, ReadRequest, Sample, View

NUM_PROBES = 8
"""Images of a data set whose headers are looked at before a training begins."""

_ENDINGS = (".jpg", ".jpeg")
_TURNS = {  # by EXIF orientation: whether rows and columns change places first, then which axes are reversed
    1: (False, ()), 2: (False, (2,)), 3: (False, (1, 2)), 4: (False, (1,)),
    5: (True, ()), 6: (True, (2,)), 7: (True, (1, 2)), 8: (True, (1,)),
}  # fmt: skip


def check_sources(sources: Sequence[NamedDataset]) -> None:
    """Raises ValueError, before the training, for a data set whose images the device cannot decode.

    Of each, NUM_PROBES images are looked at, and the first whose name does not end as a JPEG's; what is wrong with
    another one is an error when it is drawn.
    """
    for source in sources:
        files = (source.file(index) for index in range(len(source)))
        odd = (index for index, file in enumerate(files) if file and Path(file).suffix.lower() not in _ENDINGS)
        probes = np.linspace(0, len(source) - 1, NUM_PROBES).astype(int).tolist()
        for index in sorted({*probes, next(odd, 0)}):
            jpeg_of(source.read_part(index, ReadRequest(frozenset(), encoded=True)), source.name)


def jpeg_of(sample: Sample, name: str) -> Jpeg:
    """The image of a sample that was wanted encoded. Raises ValueError where a reader gave pixels."""
    if sample.jpeg is None:
        raise ValueError(
            f"data set {name} gives image {sample.image_id} as pixels, not as a JPEG file; data.decode: device decodes "
            "JPEGs alone, of readers that hand them over (coco, nyuv2, folder); set data.decode: workers"
        )
    return sample.jpeg


def encoded(jpegs: Sequence[Jpeg], windows: Sequence[CropResize], size: Size) -> Encoded:
    """A batch of photographs, with the window that each is to show, on images padded to `size` = (H, W)."""
    views = [
        View(
            file=jpeg.file,
            num_bytes=len(jpeg.content),
            size=jpeg.size,
            orientation=jpeg.orientation,
            top=window.top,
            left=window.left,
            crop=window.size,
            choose_scale=window.choose_scale,
            out=window.out,
            mirrored=window.mirrored,
        )
        for jpeg, window in zip(jpegs, windows, strict=True)
    ]
    # one tensor: each one more is a file of shared memory on its way from the worker
    return Encoded(torch.from_numpy(np.concatenate([jpeg.content for jpeg in jpegs])), views, size)


def decode(batch: Encoded, device: torch.device) -> Tensor:
    """uint8 [B, 3, H, W] on the device, its channels last in memory: each view at the top left, 0 elsewhere.

    On CUDA the host waits for the decoder, and before for what the current stream has to do: to be called on a stream
    of its own, while a step runs. Elsewhere libjpeg-turbo decodes on the CPU. Raises ValueError naming a damaged file.
    """
    photos = _photos(batch, device)
    canvas = torch.zeros(len(photos), *batch.size, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    for place, photo, view in zip(canvas, photos, batch.views, strict=True):
        place[:, : view.out[0], : view.out[1]] = _shown(photo, view)
    return canvas


def with_mean_grey(colour: Tensor, image: Tensor, views: Sequence[View]) -> Tensor:
    """Colour matrices [B, 3, 4] made for images of mean grey 1, for these images. Waits for nothing."""
    shown = [one[:, : view.out[0], : view.out[1]] for one, view in zip(image, views, strict=True)]
    mean = torch.stack([one.mean((1, 2), dtype=torch.float32) for one in shown])  # [B, 3], without the padding
    red, green, blue = GREY.tolist()  # numbers, for an array would have to be copied to the device
    grey = red * mean[:, 0] + green * mean[:, 1] + blue * mean[:, 2]
    return torch.cat([colour[:, :, :3], colour[:, :, 3:] * grey[:, None, None]], dim=2)


def _photos(batch: Encoded, device: torch.device) -> list[Tensor]:
    """uint8 [3, H, W] each, as stored."""
    contents = list(batch.content.split([view.num_bytes for view in batch.views]))
    if device.type == "cuda":
        # torchvision 0.29 decodes on a stream of its own into memory of the current one, where it may still be read
        torch.cuda.current_stream(device).synchronize()
    try:
        photos = _decode_jpegs(contents, device)
    except RuntimeError:
        for content, view in zip(contents, batch.views, strict=True):
            _find_fault(content, view, device)
        raise
    for photo, view in zip(photos, batch.views, strict=True):
        stored = view.size[::-1] if _TURNS[view.orientation][0] else view.size
        if tuple(photo.shape[1:]) != stored:
            raise ValueError(
                f"{view.file} decodes to {photo.shape[1]}x{photo.shape[2]} px, but its header says "
                f"{stored[0]}x{stored[1]}; they must agree; fetch or convert it again"
            )
    return photos


def _find_fault(content: Tensor, view: View, device: torch.device) -> None:
    """Raises ValueError if this is the file that cannot be decoded: an error of a batch does not say which it is."""
    try:
        _decode_jpegs([content], device)
    except RuntimeError as error:
        raise ValueError(
            f"{view.file} cannot be decoded on {device}: {str(error).splitlines()[0]}; a whole JPEG, baseline or "
            "progressive, in grey or colour is needed; fetch or convert it again, or set data.decode: workers"
        ) from error


def _decode_jpegs(contents: list[Tensor], device: torch.device) -> list[Tensor]:
    decoded: list[Tensor] = decode_jpeg(contents, ImageReadMode.RGB, device if device.type == "cuda" else "cpu")
    return [photo.to(device) for photo in decoded]


def _shown(photo: Tensor, view: View) -> Tensor:
    """float32 [3, h, w] of whole numbers."""
    lies, backwards = _TURNS[view.orientation]
    photo = photo.transpose(1, 2) if lies else photo
    photo = photo.flip(backwards) if backwards else photo  # which copies
    crop = photo[:, view.top : view.top + view.crop[0], view.left : view.left + view.crop[1]].float()
    if view.choose_scale > 1:
        crop = F.avg_pool2d(crop, view.choose_scale)
    resized = F.interpolate(crop[None], view.out, mode="bilinear", antialias=True)[0].round_()
    return resized.flip(2) if view.mirrored else resized
