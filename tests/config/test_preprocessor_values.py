"""Every key of preprocessor_config.json with values that it can't have: media made ready, or one documented error."""

import json
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest

from g3n_mlx.config.model import ModelConfig
from g3n_mlx.failures import Error
from g3n_mlx.media.audio import Audio
from g3n_mlx.media.image import Image
from g3n_mlx.media.opener import MediaOpener
from g3n_mlx.media.policy import MediaPolicy

VALUES = (None, [], {}, True, "x", 0, -1, 10**9, 10**400, nan, inf, 0.5, 1e99, [[]], [None], [1e99])
SOURCES = {
    "image": Image(np.zeros((64, 48, 3), np.uint8)),
    "audio": Audio(np.linspace(-0.5, 0.5, 16_000, dtype=np.float32), 16_000),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_key_with_every_wrong_value(tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    raw = json.loads((tiny_folder / "preprocessor_config.json").read_text())
    config, path = ModelConfig.from_file(tiny_folder), tmp_path / "preprocessor_config.json"
    for key in raw:
        for value in VALUES:
            path.write_text(json.dumps({**raw, key: value}))
            try:
                MediaOpener(tmp_path, config).open(SOURCES[kind], MediaPolicy())
            except Error as error:
                message = str(error)
            else:
                continue
            assert len(message) < 600, (key, value)
