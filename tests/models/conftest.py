"""The tiny pipelines, one folder a family."""

from pathlib import Path

import pytest

from tests.models import tiny


@pytest.fixture(scope="session")
def folders(tiny_sd: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: getattr(tiny, maker)(tmp_path_factory.mktemp(name)) for name, maker in tiny.MAKERS.items()}
    return {"sd": Path(tiny_sd), **made}
