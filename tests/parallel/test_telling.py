"""What a user reads when a run ends early: once what all ranks end with, else with the rank."""

from __future__ import annotations

import pytest

from megatron_tokenformer.errors import UserError
from megatron_tokenformer.parallel import telling


@pytest.mark.parametrize(
    ("rank", "error", "told"),
    [
        (0, UserError("wrong key"), "error: wrong key\n"),
        (1, UserError("wrong key"), ""),
        (0, UserError("no GPU", 1), "error: rank 0: no GPU\n"),
        (1, UserError("no GPU", 1), "error: rank 1: no GPU\n"),
        (0, UserError("rank 1 on b: other data", 1, everywhere=True), "error: rank 1 on b: other data\n"),
        (1, UserError("rank 1 on b: other data", 1, everywhere=True), ""),
    ],
)
def test_what_all_ranks_end_with_is_told_once(
    rank: int,
    error: UserError,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(telling, "PATIENCE_S", 0.0)
    here = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    for name, value in {**here, "MASTER_ADDR": "h", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert telling.tell(error) == error.exit_code
    assert capsys.readouterr().err == told
