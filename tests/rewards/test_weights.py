"""Where weights are looked for, what is fetched, and what is said when they are nowhere. The hub is a folder
here."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from alignlab.rewards.image_reward import ImageReward
from alignlab.rewards.weights import at_hand, fetched, look, on_hub, tensors

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds owner/name at two commits, and no network."""
    repository = tmp_path / "hub" / "models--owner--name"
    for commit in (OLD, NEW):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "head.pth").write_text(commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(NEW)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_the_hubs_cache_is_at_hand(cache: Path) -> None:
    """The newest commit that was fetched, or the one that is asked for; without network."""
    assert (
        on_hub("owner/name")
        and not on_hub("owner/name.pth")
        and not on_hub(str(cache))
        and not on_hub("../name")
    )
    assert fetched("owner/name", "head.pth").read_text() == NEW
    assert fetched("owner/name", "head.pth", OLD).read_text() == OLD
    assert at_hand("owner/name", "other.pth") is None and at_hand("owner/name", "head.pth", "c" * 40) is None
    look("owner/name", "other.pth")  # may be on the hub: the run will see


def test_what_the_hub_does_not_give(cache: Path) -> None:
    """One sentence: the key, the file and the mend; also where a library is what fetches."""
    with pytest.raises(
        FileNotFoundError,
        match=(
            r"^path=owner/name: other.pth is not on this machine and the hub did not give it \(.*\); set "
            r"path to"
        ),
    ) as said:
        fetched("owner/name", "other.pth")
    assert "\n" not in str(said.value)
    with pytest.raises(FileNotFoundError, match=r"^path=owner/name: ImageReward.pt is not on this machine"):
        ImageReward("owner/name")


def test_it_is_fetched_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the commit that the configuration names."""
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *a, **k: asked.append((a, k)) or str(cache / "file")
    )
    assert fetched("owner/name", "other.pth", OLD) == cache / "file"
    fetched("owner/name", "head.pth", OLD)
    assert asked == [(("owner/name", "other.pth"), {"revision": OLD})]


def test_a_file_or_a_folder(tmp_path: Path) -> None:
    """The file itself, or a folder with it; a mistyped file is not taken for a repository."""
    file = tmp_path / "any.pth"
    file.write_text("")
    assert at_hand(str(file), "head.pth") == file and at_hand(str(tmp_path), "any.pth") == file
    with pytest.raises(
        FileNotFoundError, match=r"^path=weights/head.pth: there is no such file or folder; give"
    ):
        look("weights/head.pth", "head.pth")


@pytest.mark.parametrize("wrap", [False, True])
def test_state_dicts(wrap: bool, tmp_path: Path) -> None:
    """Bare, or under "state_dict" beside plain values."""
    state = {"w": torch.ones(2)}
    torch.save({"state_dict": state, "epoch": 1} if wrap else state, tmp_path / "a.pt")
    assert torch.equal(tensors(tmp_path / "a.pt")["w"], state["w"])
    for name, content in {"a.pt": b"no", "a.safetensors": b"no"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is no file of weights \(.*\); fetch it again"):
            tensors(tmp_path / name)
    torch.save([1, 2], tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a.pt holds no state dict; give the file that was published"):
        tensors(tmp_path / "a.pt")
