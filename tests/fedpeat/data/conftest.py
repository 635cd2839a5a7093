from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fedpeat.data import FederatedData, prepare
from tests.fedpeat.data.corpus import make_tokenizer, write_jsonl


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: document i of `documents` is of token `4 + i`, so rows tell where they came from."""
    return make_tokenizer()


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., FederatedData]:
    """Prepare rows written as JSON lines."""

    def call(
        rows: list[dict[str, Any]],
        *,
        count: int | None = None,
        seed: int = 0,
        batch_size: int = 1,
        cache: str = "cache",
        **settings: Any,
    ) -> FederatedData:
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        source = {"kind": "jsonl", "path": str(path), "block_size": 6, **settings}
        return prepare(
            source,
            tokenizer=tokenizer,
            tokenizer_id="words",
            clients_count=count,
            seed=seed,
            cache_folder=tmp_path / cache,
            batch_size=batch_size,
        )

    return call
