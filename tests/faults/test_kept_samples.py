"""The samples of an unfinished epoch (RUN/collected): one flipped bit, in the numbers or in the header, and
they are drawn again."""

from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.engine.noise import noise_key
from alignlab.rewards.compose import RewardError
from alignlab.training.setup import Lab
from alignlab.training.unfinished_epoch import Collected
from tests.running import configured, tiny


def test_a_flipped_bit_anywhere_is_noticed(tiny_sd: str, tmp_path: Path) -> None:
    """Every byte of the header, with each of two of its bits: which weights and noise the samples are of,
    which steps were stored, the passes that they took and the order of their numbers."""
    lab = Lab.from_config(configured(*tiny(tiny_sd, "algo=ddpo")))
    key = noise_key(["cat"], seed=0, stream="train", epoch=1)
    home = Collected(tmp_path / "collected")
    with pytest.raises(RewardError), home.epoch(1, lab.policy, lab.objective, lambda step: None):
        with torch.no_grad():
            record = home.rollout(0, lab.policy, lab.sampler, key, offload=False)
        raise RewardError("no answer")
    (file,) = (tmp_path / "collected").rglob("*.safetensors")

    def read() -> Any:
        return home._read(file, lab.policy, lab.sampler, key)

    twin, passes = read()
    assert twin.images.equal(record.images) and passes > 0
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    assert b'"noise"' in whole[:header] and header < 2000
    for place in [*range(header), header, len(whole) - 1]:
        for bit in (0, 5):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            file.write_bytes(bytes(damaged))
            taken = read()
            if taken is not None:  # a blank that pads the header, and says nothing
                assert whole[place : place + 1] == b" ", (place, bit, bytes(damaged[:header]))
    file.write_bytes(whole)
    assert read() is not None
