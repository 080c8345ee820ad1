"""Rebuilds the tiny Gemma 3n checkpoint and every golden output, into a folder that is given.

    python make_reference.py --output FOLDER

Made with transformers 5.23.0, timm 1.0.31, torch 2.13.0 (CPU), torchvision 0.29.2, tokenizers
0.23.3, safetensors 0.8.0, numpy 2.4.6, pillow 13.0.0.  All seeds are fixed, so the same versions
give the same files; other versions give the same numbers up to the noise in golden/noise.json.

torchvision: transformers' image processor needs it, but the wheel on PyPI is built for CUDA and
does not import next to a CPU build of torch.  Install it with `pip install --no-deps torchvision`;
reference_builder/torchvision_stubs.py declares the operators it misses (the resize needs none).
"""

import argparse
import pathlib

from reference_builder.torchvision_stubs import declare_missing_operators

declare_missing_operators()

from reference_builder.build import build  # noqa: E402  (imports torchvision)
from reference_builder.profile import Profile  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the tiny Gemma 3n reference set.")
    parser.add_argument("--output", type=pathlib.Path, required=True)
    output = parser.parse_args().output
    build(Profile(), output)


if __name__ == "__main__":
    main()
