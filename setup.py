"""Packaging of megatron_moe_inject (tool settings live in pyproject.toml)."""

from setuptools import find_packages, setup

setup(
    name="megatron-moe-inject",
    version="0.1.0",
    description=(
        "Megatron-Core plugin that distils small dense teachers into chosen experts "
        "of a large MoE model while it trains"
    ),
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_moe_inject", "megatron_moe_inject.*"]),
    package_data={"megatron_moe_inject": ["py.typed"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core[training]>=0.18.2,<0.21",
        "omegaconf>=2.3",
        "safetensors>=0.4",
        "tqdm>=4.66",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]>=2.8"],
        "hf": ["transformers>=4.56", "tokenizers>=0.21"],
        "bench": ["nvidia-modelopt>=0.47", "liger-kernel>=0.8.5", "matplotlib>=3.8"],
        "signed": ["cryptography>=42"],
        "captured": ["pyarrow>=14", "zstandard>=0.22"],
        "report": ["matplotlib>=3.8", "jinja2>=3.1"],
        "dev": [
            "pytest>=8",
            "hypothesis>=6",
            "jsonschema>=4.20",
            "pytest-xdist>=3.7",
            "ruff>=0.9",
            "mypy>=1.13",
            "transformers>=4.56",
            "tokenizers>=0.21",
            "matplotlib>=3.8",
            "jinja2>=3.1",
            "tensorboard>=2.16",
            "peft>=0.21",
            "cryptography>=42",
            "pyarrow>=14",
            "zstandard>=0.22",
        ],
    },
    entry_points={"console_scripts": ["moe-inject = megatron_moe_inject.cli:main"]},
)
