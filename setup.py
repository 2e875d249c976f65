"""The distribution gem-kernels: the packages gem_kernels (needs torch alone) and gem (the training layer, extra `train`)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "gem_kernels/__init__.py").read_text(encoding="utf-8"))[1]

TRAIN = [
    "transformers>=5.10",
    "accelerate>=1.10",
    "datasets>=4.0",
    "peft>=0.18",
    "matplotlib>=3.7",
    "tqdm>=4.66",
    "pyyaml>=6.0",
    "requests>=2.32",
]

GGUF = "gguf>=0.17"  # transformers accepts older versions, which fail with NumPy 2

setup(
    name="gem-kernels",
    version=VERSION,
    description="Exact log-probabilities, entropies and group losses of a language model without its logits; and GEM.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["gem_kernels*", "gem", "gem.*"]),
    package_data={"gem_kernels": ["py.typed"], "gem": ["py.typed"]},
    install_requires=["torch>=2.8", "triton>=3.4; sys_platform == 'linux'"],
    extras_require={
        "train": TRAIN,
        "trl": [*TRAIN, "trl>=1.16"],
        "bench": [*TRAIN, "pytest-benchmark>=5.0", "liger-kernel>=0.6", "cut-cross-entropy", "trl>=1.16"],
        "eval": ["lm-eval>=0.4.9", "math-verify>=0.8"],
        "flash": ["flash-attn"],
        "gguf": [*TRAIN, GGUF],
        "test": [*TRAIN, GGUF, "trl>=1.16", "pytest>=8.0", "choix>=0.4", "scipy>=1.11"],
        # mypy needs the packages that the code imports to check against their signatures.
        "lint": [*TRAIN, "pytest>=8.0", "ruff==0.17.6", "mypy==2.4.1", "types-PyYAML", "types-requests", "types-tqdm"],
    },
    entry_points={"console_scripts": ["gem-kernels=gem.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: OS Independent",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
