"""What is installed, from where, and with which libraries; the settings of development tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent

# folders at the top level that a wheel carries inside the package; a top-level package called `datasets`
# would shadow Hugging Face's
carried = {"visionmtl._datasets": "datasets", "visionmtl._configs": "configs", "visionmtl._tools": "tools"}

version = re.search(r'__version__ = "(.+)"', (here / "visionmtl/__init__.py").read_text(encoding="utf-8"))[1]
formats = ["OpenEXR>=3.3", "tifffile>=2024.8"]  # depth in .exr files; TIFFs of many bands
prepare = ["h5py>=3.11"]  # the official NYUv2 file is MATLAB 7.3, i.e. HDF5
demo = ["gradio>=6.0"]
supervision = ["supervision>=0.25"]
fast = ["faster-coco-eval>=1.6"]
shards = ["aiohttp>=3.9", "fsspec[http]>=2024.6", "s3fs>=2024.6"]  # of a web server or an object store
export = ["onnx>=1.18", "onnxruntime>=1.22", "onnxscript>=0.5", "openvino>=2025.1"]

setup(
    name="visionmtl",
    version=version,
    description="One network that detects, segments and measures depth.",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="visionmtl contributors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        "computer vision",
        "multi-task learning",
        "object detection",
        "semantic segmentation",
        "depth estimation",
    ],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    package_dir=carried,
    packages=[*find_packages(include=["visionmtl", "visionmtl.*"]), *carried, "visionmtl._datasets.scenes"],
    package_data={
        "visionmtl": [
            "py.typed",
            "report/*.j2",
            "inference/*.html",
            "inference/*.css",
            "inference/*.js",
            "weights/*",
        ],
        "visionmtl._configs": ["*.yaml", "*.json", "compare/*.yaml"],
    },
    include_package_data=False,
    zip_safe=False,
    entry_points={"console_scripts": ["visionmtl = visionmtl.cli:main"]},
    install_requires=[
        "albumentations>=2.0",
        "filelock>=3.12",
        "huggingface-hub>=0.25",
        "jinja2>=3.1",
        "numpy>=1.26",
        # the headless build: albumentations requires it, and `opencv-python` beside it overwrites its files
        "opencv-python-headless>=4.10",
        "pillow>=10.3",
        "pycocotools>=2.0.8",
        "pydantic>=2.9.2",
        "pydantic-core",  # the one version that pydantic pins
        "pyyaml>=6.0",
        "rich>=13.7",
        "safetensors>=0.4.3",
        "scipy>=1.11",
        "segmentation-models-pytorch>=0.5",
        "tensorboard>=2.17",
        "timm>=1.0.15",
        "torch>=2.8",
        "torchjd>=0.18",  # older ones require quadprog, which is under the GPL
        "torchvision>=0.23",
        "typing_extensions>=4.9",
    ],
    extras_require={
        "prepare": prepare,
        "docs": ["furo", "myst-parser>=4", "sphinx>=8"],
        "wandb": ["wandb>=0.19"],
        "mlflow": ["mlflow-skinny>=2.20"],
        "demo": demo,
        "executorch": ["executorch>=1.0"],  # pins its own versions of much
        "export": export,
        "fast": fast,
        "formats": formats,
        "shards": shards,
        "supervision": supervision,
        "dev": [
            *prepare,
            *demo,
            *export,
            *formats,
            "fsspec[http]>=2024.6",
            *supervision,
            "playwright>=1.49",  # drives the installed chromium in tests of pages
            "build>=1.2",
            *fast,
            "import-linter>=2.17; python_version >= '3.11'",
            "cityscapesScripts>=2.2",
            "datasets>=2.20",
            "jsonschema>=4.18",
            "mypy>=1.15",
            "pytest>=8.2",
            "pytest-xdist>=3.6",
            "ruff>=0.11",
            "setuptools>=77",
            "torchmetrics>=1.4",
            "types-PyYAML>=6.0",
            "webdataset>=0.2.100",  # reads what we write, in a test
            "wheel>=0.43",
        ],
    },
)
