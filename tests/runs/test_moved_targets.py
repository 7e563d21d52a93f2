"""Names of before the rooms: stored configurations build, and who imports an old module is told its new
name."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from alignlab.config.build import resolve
from alignlab.runs.moved_targets import MOVED, with_moved_targets

OF_A_RUN = {
    "policy": {"_target_": "alignlab.policy.Policy", "lora": {"_target_": "alignlab.policy.LoRA", "rank": 8}},
    "samplers": [{"_target_": "alignlab.samplers.ddim"}],
    "algo": {"_target_": "alignlab.objectives.ddpo.DDPO"},
}


def test_every_old_name_has_something_at_its_new_one() -> None:
    """Modules can be imported by either name, and are the same; classes are there."""
    for old, new in MOVED.items():
        if new.rpartition(".")[2][0].isupper():
            assert callable(resolve(new))
            continue
        now = importlib.import_module(new)
        sys.modules.pop(old, None)
        with pytest.warns(FutureWarning, match=f"^{re.escape(old)} is {re.escape(new)} now; import that$"):
            assert importlib.import_module(old) is now
        assert now.__spec__ is not None and now.__spec__.name == now.__name__ == new


def test_a_stored_configuration_names_what_there_is() -> None:
    """Wherever a _target_ stands in it; the rest is as it was."""
    now = with_moved_targets(OF_A_RUN)
    assert now["policy"] == {
        "_target_": "alignlab.engine.policy.Policy",
        "lora": {"_target_": "alignlab.models.lora.LoRA", "rank": 8},
    }
    assert (
        now["samplers"] == [{"_target_": "alignlab.engine.samplers.ddim"}] and now["algo"] == OF_A_RUN["algo"]
    )


def test_a_module_of_the_users_own_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was written before the rooms is told the new name, and works."""
    (tmp_path / "my_old_reward.py").write_text("from alignlab.rollout import Rollout\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("alignlab.rollout", None)
    with pytest.warns(FutureWarning, match=r"alignlab\.rollout is alignlab\.engine\.rollout now"):
        assert resolve("my_old_reward.Rollout") is resolve("alignlab.engine.rollout.Rollout")
    with pytest.raises(ModuleNotFoundError, match=r"alignlab\.nothing"):
        importlib.import_module("alignlab.nothing")
