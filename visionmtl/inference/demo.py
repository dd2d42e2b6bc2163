"""A page in the browser: an image in, every task's picture out, with class, metres and score under the pointer."""

import base64
import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from visionmtl.inference.predictor import Predictor, Result
from visionmtl.io.images import read_image
from visionmtl.visualization.canvas import enlarge
from visionmtl.visualization.draw import MIN_SCORE, DrawOptions, scaled
from visionmtl.visualization.palette import recolour
from visionmtl.visualization.panels import MAX_CELL_PX, at_cell_size, with_distances

if TYPE_CHECKING:
    from gradio import Blocks

GRID_PX = 200
"""Longer side at most of the class and depth maps that the page looks values up in."""
KEPT_S = 600
"""Uploaded images lie in a temporary folder for so many seconds, and no longer than the page is served."""
_JPEG_QUALITY = 90
_HERE = Path(__file__).parent


def page_data(result: Result, min_score: float = MIN_SCORE) -> dict[str, Any]:
    """What the page shows of a result, as plain data.

    panels: title, a JPEG as a data URL, and which share of its height and width shows the image: beside it may lie a
    legend or white;
    boxes: as `ResultBoxes.rows`, but xyxy as shares of width and height; classes: names of those of the segmentation;
    class_map, depth_map: rows of class positions and of metres, reduced to GRID_PX
    """
    height, width = result.image.shape[:2]
    image, spaces = at_cell_size(result.image, MAX_CELL_PX), recolour(result.spaces)
    image_size = enlarge(image).shape  # as drawings show it
    panels = [_panel("image", enlarge(image), image_size)]
    for name, value in with_distances(result.predictions, min_score).items():
        value = scaled(value, (height, width), image.shape[:2])
        drawn = result.tasks[name].draw(image, value, spaces[name], DrawOptions(min_score))
        panels.append(_panel(name, drawn, image_size))
    data: dict[str, Any] = {"size": [height, width], "panels": panels}
    if result.boxes is not None:
        data["boxes"] = result.boxes.above(min_score).rows()
        for row in data["boxes"]:
            row["xyxy"] = (np.array(row["xyxy"]) / (width, height, width, height)).tolist()
    rows, columns = (_reduced(side, max(height, width)) for side in (height, width))
    if result.segmentation is not None:
        data["classes"] = list(result.space("segmentation").classes)
        data["class_map"] = result.segmentation[np.ix_(rows, columns)].tolist()
    if result.depth_m is not None:
        data["depth_map"] = np.round(result.depth_m[np.ix_(rows, columns)].astype(np.float64), 2).tolist()
    return data


def _reduced(side: int, longer: int) -> NDArray[np.int64]:
    """Positions along a side, evenly spread: those of the pixels that lie under the centres of a coarser grid."""
    count = max(1, min(side, round(side * GRID_PX / longer)))
    return (np.arange(count) * 2 + 1) * side // (2 * count)


def _panel(title: str, picture: NDArray[np.uint8], image_size: tuple[int, ...]) -> dict[str, Any]:
    """image_size: (H, W, ...) of the picture's top left part that shows the image."""
    written, jpeg = cv2.imencode(
        ".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
    )
    assert written
    url = f"data:image/jpeg;base64,{base64.b64encode(jpeg.tobytes()).decode('ascii')}"
    share = [min(1.0, image / whole) for image, whole in zip(image_size[:2], picture.shape[:2], strict=True)]
    return {"title": title, "url": url, "share": share}


def build(predictor: Predictor, title: str, min_score: float = MIN_SCORE) -> "Blocks":
    """The page, not served yet. It asks nothing of other servers."""
    gradio = _gradio()
    names = list(predictor.net.tasks)

    def predict(file: str | None, tasks: list[str]) -> Result | None:
        return None if file is None or not tasks else predictor(read_image(file), tasks=tasks)

    def show(result: Result | None, score: float) -> str:
        return "" if result is None else json.dumps(page_data(result, score))

    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(KEPT_S, KEPT_S)) as page:
        gradio.Markdown(f"# visionmtl\n{_escaped(title)}")
        predicted = gradio.State(None)
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                # the file as it is, for gradio would show what is transparent, and make 16 bits white
                image = gradio.Image(
                    label="Image", type="filepath", image_mode=None, sources=["upload", "webcam", "clipboard"],
                    buttons=[], height=280,
                )  # fmt: skip
                tasks = gradio.CheckboxGroup(names, value=names, label="Tasks")
                score = gradio.Slider(0, 1, value=min_score, step=0.01, label="Boxes with a score of at least")
            with gradio.Column(scale=3, min_width=320):
                shown = gradio.HTML(
                    value="",
                    apply_default_css=False,
                    html_template=(_HERE / "demo.html").read_text(encoding="utf-8"),
                    css_template=(_HERE / "demo.css").read_text(encoding="utf-8"),
                    js_on_load=(_HERE / "demo.js").read_text(encoding="utf-8"),
                )
        for changed in (image.change, tasks.change):
            changed(predict, [image, tasks], predicted, api_visibility="private").then(
                show, [predicted, score], shown, api_visibility="private"
            )
        # of the values that the slider passes through, those that it is still at when the page is ready for the next
        score.change(show, [predicted, score], shown, trigger_mode="always_last", api_visibility="private")
    return page


def check_address(host: str, port: int) -> None:
    """Raises ValueError where nothing can listen."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise ValueError(
            f"nothing can listen at {host}:{port} ({error.strerror}); an address of this machine and a port that no "
            "other program uses are needed; choose another --port or --host"
        ) from error


def serve(page: "Blocks", host: str, port: int, wait: bool = True) -> str:
    """Serve the page at an address of this machine, and return its URL; wait: until it is interrupted."""
    gradio = _gradio()
    system = ["system-ui", "sans-serif"]
    theme = gradio.themes.Default(font=system, font_mono=["ui-monospace", "monospace"])  # no font of another server
    _, address, _ = page.launch(
        server_name=host, server_port=port, theme=theme, footer_links=[], quiet=True, show_error=True, share=False,
        prevent_thread_lock=not wait,
    )  # fmt: skip
    return str(address)


def _escaped(text: str) -> str:
    """Markdown that shows the text as it is."""
    return "".join(f"\\{character}" if character in "\\`*_{}[]()#+-.!|<>&~$" else character for character in text)


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise ValueError(
            "the package gradio is not installed; the demo needs it; install it with pip install 'visionmtl[demo]'"
        ) from error
    return gradio
