"""Every setting of the data, checked before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from fedpeat.core import ConfigError, nearest

_OWN_KEYS = {
    "sample_by": ("text",),
    "delimiter": ("csv",),
    "name": ("hub",),
    "split": ("hub",),
    "revision": ("hub",),
    "server_split": ("hub",),
    "libraries": ("docstrings",),
}
_OPTIONS = {
    "separator": ("eos", "bos", "none"),
    "tail": ("drop", "pad"),
    "too_small": ("drop", "error", "keep"),
    "sample_by": ("line", "paragraph", "document"),
}
_SHARES = ("validation_share", "test_share", "server_share", "public_share")


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """The keys of a `conf/data/*.yaml`; what each means stands beside it there.

    What a run must choose has no default here; all else is off until asked for. `test_blocks` takes the place of
    `test_share`.

    >>> DataSpec.of({"kind": "jsonl", "path": "speeches.jsonl", "block_size": 128, "test_share": 0.1}).text_field
    'text'
    """

    kind: str
    block_size: int
    path: str | list[str] | None = None
    text_field: str = "text"
    prompt_field: str | None = None
    answer_field: str | None = None
    prompt_template: str | None = None
    choices: str | list[str] | None = None
    client_field: str | list[str] | None = None
    label_field: str | None = None
    partitioner: str = "natural"
    partitioner_options: Mapping[str, Any] = field(default_factory=dict)
    separator: str = "eos"
    tail: str = "drop"
    validation_share: float = 0.0
    test_share: float = 0.0
    test_blocks: int = 0
    min_blocks: int = 1
    too_small: str = "drop"
    server_share: float = 0.0
    public_share: float = 0.0
    server_path: str | list[str] | None = None
    sample_by: str | None = None
    delimiter: str | None = None
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    server_split: str | None = None
    libraries: list[str] | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> DataSpec:
        """Check flat settings and return them as a value.

        Raises:
            ConfigError: If a key is unknown, missing, out of range, or does not go with another one.
        """
        known = {item.name for item in fields(cls)}
        for key in settings:
            if key not in known:
                raise ConfigError(f"unknown setting data.{key}", "", nearest(key, known))
        for key in ("kind", "block_size"):
            if settings.get(key) is None:
                raise ConfigError(f"data.{key} must be set", "it is not", f"set data.{key}")
        spec = cls(**settings)
        spec._check_options()
        spec._check_numbers()
        spec = replace(spec, choices=spec._checked_choices())
        spec._check_pairs()
        spec._check_origin()
        return replace(spec, test_share=0.0) if spec.test_blocks else spec

    @property
    def client_fields(self) -> tuple[str, ...]:
        """The fields that name a natural client; empty if none do."""
        if self.client_field is None:
            return ()
        return (self.client_field,) if isinstance(self.client_field, str) else tuple(self.client_field)

    @property
    def is_paired(self) -> bool:
        """Whether documents are prompt/answer pairs, with loss on the answer only."""
        return self.answer_field is not None

    @property
    def has_server_source(self) -> bool:
        """Whether the server has a source of its own."""
        return self.server_path is not None or self.server_split is not None

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return asdict(self)

    def _check_options(self) -> None:
        for key, options in _OPTIONS.items():
            value = getattr(self, key)
            if value is not None and value not in options:
                raise ConfigError(f"data.{key}={value!r} is no choice", "", nearest(str(value), options))
        for key, kinds in _OWN_KEYS.items():
            if getattr(self, key) is not None and self.kind not in kinds:
                raise ConfigError(f"data.{key} cannot be set", f"data={self.kind} has no use for it", "leave it out")

    def _check_numbers(self) -> None:
        for key, least in {"block_size": 2, "test_blocks": 0, "min_blocks": 0}.items():
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"data.{key}={value!r} is no size", f"whole numbers from {least} are", f"set data.{key}"
                )
        for key in _SHARES:
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise ConfigError(f"data.{key}={value!r} is no share", "a share is >= 0 and < 1", f"set data.{key}")
        for one, other in (("validation_share", "test_share"), ("server_share", "public_share")):
            total = getattr(self, one) + getattr(self, other)
            if total >= 1:
                found = "nothing is left to train on"
                raise ConfigError(f"data.{one} + data.{other} = {total:g}", found, "lower one of them")

    def _check_pairs(self) -> None:
        if self.is_paired and self.prompt_field is None and self.prompt_template is None:
            raise ConfigError("data.answer_field is set alone", "an answer needs a prompt", "set data.prompt_field")
        if not self.is_paired and (self.prompt_field is not None or self.prompt_template is not None):
            raise ConfigError("a prompt is set alone", "a prompt needs an answer to be learnt", "set data.answer_field")

    def _checked_choices(self) -> str | list[str] | None:
        """Return the possible answers as text: a list in YAML may hold whole numbers."""
        given = self.choices
        if given is None:
            return None
        if not self.is_paired:
            found = "documents have no answers"
            raise ConfigError("data.choices is set", found, "set data.answer_field, and data.prompt_field or _template")
        if given == "auto":
            return given
        names = given if isinstance(given, list | tuple) else []
        texts = [str(name) for name in names]
        plain = {" ".join(text.split()) for text in texts}
        right_type = all(isinstance(name, str | int) and not isinstance(name, bool) for name in names)
        if not right_type or len(plain) < 2 or len(plain) < len(texts) or "" in plain:
            remedy = "set data.choices to auto, or to a list such as [positive, negative], with yes and no in quotes"
            raise ConfigError(f"data.choices={given!r}", "two or more different texts are needed", remedy)
        return texts

    def _check_origin(self) -> None:
        if self.kind == "docstrings":
            if self.path is not None or self.server_path is not None:
                remedy = "set data.libraries, or another data="
                raise ConfigError("data has a path", "data=docstrings reads installed libraries", remedy)
        elif self.path is None and not self.has_server_source:
            what = "a dataset's id or folder" if self.kind == "hub" else "a file, a folder or a glob"
            raise ConfigError(f"data={self.kind} needs data.path", "it is not set", f"set data.path=<{what}>")
