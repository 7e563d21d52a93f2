"""Names of before the rooms: stored configurations build, and who imports an old module is told its new
name."""

import importlib
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
    """Modules are there to be imported, classes in them."""
    for old, new in MOVED.items():
        if new.rpartition(".")[2][0].isupper():
            assert callable(resolve(new))
        else:
            importlib.import_module(new)
        with pytest.raises(ImportError):
            importlib.import_module(old)


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


def test_who_imports_an_old_module_is_told_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a module of the user's own, and in a name that is typed."""
    (tmp_path / "my_old_reward.py").write_text("from alignlab.rollout import Rollout\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        ImportError, match=r"alignlab\.rollout is alignlab\.engine\.rollout now; write that in my_old_reward"
    ):
        resolve("my_old_reward.Reward")
    assert "my_old_reward" not in sys.modules
    with pytest.raises(
        ImportError, match=r"^alignlab\.samplers is alignlab\.engine\.samplers now; write that$"
    ):
        resolve("alignlab.samplers.ddim")
