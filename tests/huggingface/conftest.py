"""Small models, exported once for all tests of a file, and a transformers that keeps to itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_tokenformer.huggingface.export import write_hf
from tests.huggingface.models import KINDS, Pair, native_model, portable_model


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Code that transformers copies out of a model's folder goes into the tests' own, and nothing is fetched.

    For all tests together: where the code has been imported from once, more is looked for.
    """
    home = tmp_path_factory.mktemp("hf_home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(home))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(home / "modules"))
        yield


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A model of each kind: as a folder for transformers, and the native one to compare with."""
    folder = tmp_path_factory.mktemp(request.param)
    portable = portable_model(request.param)
    write_hf(portable, folder / "hf")
    return Pair(portable, folder / "hf", native_model(portable, folder / "native"))
