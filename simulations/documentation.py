"""The pages of `docs/` that are written from what they describe: `python -m simulations.documentation`."""

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from fedpeat.core import METRICS, ConfigError, write_text
from fedpeat.devices import COLUMNS
from simulations.strategy_table import HEADINGS, strategy_rows, table_cells

NOTICE = "<!-- Written by `make docs`; change the source it names, not this page. -->"
FIXED = ("_target_", "kind")
"""Keys that come with the option and are never set by hand."""


@dataclass(frozen=True)
class Setting:
    """One key of a config file: its dotted name within the file, its default as written, and what is said of it."""

    key: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Page:
    """One config file: what its first comment says, its settings, its choices for groups, what it goes on."""

    heading: tuple[str, ...]
    settings: tuple[Setting, ...]
    choices: dict[str, str] = field(default_factory=dict)
    inherits: tuple[str, ...] = ()


def metrics_page() -> str:
    """Return `docs/metrics.md`, from `fedpeat.core.METRICS`."""
    rows = [
        (_code(metric.name), metric.unit, metric.better or "—", _code(metric.where), metric.meaning)
        for metric in METRICS
    ]
    table = _table(("name", "unit", "better", "computed by", "meaning"), rows)
    return f"""{NOTICE}
# Metrics

Source: `fedpeat/core/metrics.py`.

{table}
## Where they stand

- `metrics.jsonl`: one line of JSON for every round, as it happens; round 0 is the state before training. `evaluations`
  holds loss, perplexity, accuracy and tokens by model, `clients` the numbers of each participant (`server` is the
  server's own training), `failures` who did not count and why. JSON knows no NaN: such a number is `null`.
- `summary.json`: the run in one object. `metrics.<model>.{{loss,perplexity,accuracy}}` are the newest evaluation of
  each model, after round `evaluated_round` (with `choice_accuracy`, where the data has choices); `bytes.{{down,up}}`
  and `seconds.*` are sums over all rounds, `seconds.total` with set-up, `bytes.bundle` is the size of one bundle;
  `status` is `finished`, `interrupted` or `failed`. `baselines.local_only` gives each client that tuned alone and the
  mean over them, `baselines.whole_model` the whole model's tuning, `baselines.extraction` what one curious client made
  of its bundle, in how many steps.
  `emulator.*` is of the run's own emulator; where devices have several, `emulators.<key>.*` is of each.
  `control` says what a controller other than `fixed` chose, and what each round came to by its objective.
- `ledger.parquet`: a row for each client and round, with its bytes, times, memory and energy: [control.md](control.md).
- `emulator.json`: what builders made and found out, by emulator: which block stands where, what was done to it, scores.
- `report.html` and `figures/`: the same for people.
- Trackers (`tracker=tensorboard|wandb|mlflow`) get the numbers of each round as `loss/<model>`, `perplexity/<model>`,
  `accuracy/<model>`, `choice_accuracy/<model>`, `seconds/<part>`, `bytes/<down|up>`, `clients/<counted|failed>`, and
  the rest by the names above.
"""


def configuration_page(conf_folder: str | Path) -> str:
    """Return `docs/configuration.md`, from the YAML files of `conf/`: keys, defaults, and the comments at the keys.

    The first comment of a file describes it; a key's comment stands beside it or above it.

    Raises:
        ConfigError: If the folder holds no YAML, or a file is not a mapping.
    """
    folder = Path(conf_folder)
    main = folder / "config.yaml"
    if not main.is_file():
        raise ConfigError(
            f"cannot describe {folder}", "it has no config.yaml", "name the folder with the config groups"
        )
    run = read_page(main)
    parts = [
        f"{NOTICE}\n# Configuration\n",
        "Source: the YAML files in `conf/`. A group is chosen by `group=option`, a key is set by `key=value`, both on\n"
        "the command line of `fedpeat simulate`; a default of `???` must be given. `fedpeat simulate --cfg job`\n"
        "prints the resolved config without running it.\n",
        "## The run\n",
        _settings_table(run.settings),
    ]
    for group in sorted(path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.yaml"))):
        parts += _group_part(group, run.choices.get(group.name))
    for other in sorted(path for path in folder.glob("*.yaml") if path != main):
        page = read_page(other)
        parts += [f"## `fedpeat {other.stem}`\n", _paragraphs(page.heading), _settings_table(page.settings)]
    return "\n".join(part for part in parts if part)


def read_page(path: Path) -> Page:
    """Read one config file with its comments.

    Raises:
        ConfigError: If it is not a YAML mapping.
    """
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read {path}", str(error), "mend the file") from error
    comment = [line for line in lines[: _length(lines)] if not line.startswith("# @")]
    heading = tuple(line.removeprefix("#").removeprefix(" ") for line in comment)
    if root is None:
        return Page(heading, ())
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"cannot read {path}", "it is not a mapping", "write key: value lines")
    settings = [one for one in _settings(root, text, lines, "") if not _left_out(one)]
    defaults = yaml.safe_load(text).get("defaults", [])
    plain = (entry for entry in defaults if isinstance(entry, str))
    inherits = tuple(entry for entry in plain if entry != "_self_" and "/" not in entry)
    return Page(heading, tuple(settings), dict(_choices(defaults)), inherits)


def _left_out(setting: Setting) -> bool:
    name = setting.key.rpartition(".")[2]
    silent_hydra = setting.key.startswith("hydra.") and not setting.meaning
    return name in FIXED or setting.key == "defaults" or silent_hydra


def _length(lines: Sequence[str]) -> int:
    """Return how many lines the file's first comment has."""
    return next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))


def _settings(node: yaml.MappingNode, text: str, lines: Sequence[str], prefix: str) -> Iterator[Setting]:
    for key, value in node.value:
        name = prefix + key.value
        if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
            yield from _settings(value, text, lines, f"{name}.")
        else:
            yield Setting(name, _default(value, text), _meaning(key, value, lines))


def _default(value: yaml.Node, text: str) -> str:
    """Return a default as it is written, without quotes where none are needed on a command line."""
    raw = text[value.start_mark.index : value.end_mark.index].strip()
    if isinstance(value, yaml.ScalarNode) and re.fullmatch(r"[\w.-]+", value.value) and value.style in ("'", '"'):
        return value.value
    return raw.splitlines()[0] + " …" if "\n" in raw else raw or "null"


def _meaning(key: yaml.Node, value: yaml.Node, lines: Sequence[str]) -> str:
    """Return the comment above a key (up to an empty line or the file's first comment) and the one beside it."""
    above: list[str] = []
    line = key.start_mark.line - 1
    while line >= _length(lines) and lines[line].strip().startswith("#"):
        above.insert(0, lines[line].strip().lstrip("#").strip())
        line -= 1
    block = isinstance(value, yaml.CollectionNode) and not value.flow_style
    end = key.end_mark if block else value.end_mark
    rest = lines[end.line][end.column :].lstrip(":").strip() if end.line < len(lines) else ""
    beside = [rest.lstrip("#").strip()] if rest.startswith("#") else []
    return " ".join(above + beside)


def _choices(defaults: Iterable[object]) -> Iterator[tuple[str, str]]:
    """Yield group and option of each entry of a defaults list."""
    for entry in defaults:
        if isinstance(entry, dict):
            for group, option in entry.items():
                yield str(group).removeprefix("override ").strip().lstrip("/"), str(option or "null")


def _group_part(group: Path, default: str | None) -> list[str]:
    """Describe a group: its options, then their keys in one table, like ones merged."""
    pages = {path.stem: read_page(path) for path in sorted(group.glob("*.yaml"))}
    overlay = any(path.read_text(encoding="utf-8").startswith("# @package _global_") for path in group.glob("*.yaml"))
    parts = [f"## `{group.name}`\n"]
    if default in (None, "null"):
        parts.append("None is chosen unless you do.\n")
    for option, page in pages.items():
        first = " (the default)" if option == default else ""
        parts.append(f"### `{group.name}={option}`{first}\n")
        parts.append(_paragraphs(page.heading))
        parts += [f"It has the keys of {_code(f'{group.name}={other}')} too.\n" for other in page.inherits]
        if overlay:
            sets = [f"{name}={value}" for name, value in page.choices.items()]
            sets += [f"{one.key}={one.default}" for one in page.settings]
            parts.append("Sets " + ", ".join(_code(word) for word in sets) + ".\n" if sets else "")
    if not overlay:
        parts.append(_merged_table(group.name, pages))
    return parts


def _merged_table(group: str, pages: dict[str, Page]) -> str:
    found: dict[Setting, list[str]] = {}
    for option, page in pages.items():
        for setting in page.settings:
            found.setdefault(setting, []).append(option)
    several = len(pages) > 1
    rows = []
    # A key's variants stand together, where the first of them came.
    order = {key: place for place, key in reversed(list(enumerate(setting.key for setting in found)))}
    for setting, options in sorted(found.items(), key=lambda item: order[item[0].key]):
        where = "all" if len(options) == len(pages) else ", ".join(_code(option) for option in options)
        row = (_code(f"{group}.{setting.key}"), _code(setting.default), setting.meaning)
        rows.append((*row[:1], where, *row[1:]) if several else row)
    columns = ("key", "option", "default", "meaning") if several else ("key", "default", "meaning")
    return _table(columns, rows) if rows else ""


def _settings_table(settings: Iterable[Setting]) -> str:
    rows = [(_code(one.key), _code(one.default), one.meaning) for one in settings]
    return _table(("key", "default", "meaning"), rows)


def _paragraphs(heading: Sequence[str]) -> str:
    """Return a comment as Markdown: its indented lines are commands."""
    out: list[str] = []
    for line in heading:
        command = line.startswith("  ")
        if command and not (out and out[-1].startswith("    ")):
            out.append("")
        out.append(f"    {line.strip()}" if command else line.replace("<", "&lt;"))
    return "\n".join(out) + "\n" if out else ""


def _code(text: str) -> str:
    """Return `text` as code within a table, where even in code a bar must be escaped."""
    text = text.replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        cells = [cell if cell.startswith("`") else cell.replace("|", "\\|").replace("<", "&lt;") for cell in row]
        lines.append([cell.replace("\n", " ") for cell in cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def control_page(text: str) -> str:
    """Return `docs/control.md` with its table of the ledger's columns written anew; the rest of `text` stays.

    Raises:
        ConfigError: If the page has no place for the table.
    """
    if BEGIN not in text or END not in text:
        raise ConfigError("cannot write the ledger's columns", "docs/control.md has no marks for them", BEGIN + END)
    before, rest = text.split(BEGIN, 1)
    rows = [(_code(column.name), _code(column.kind), column.meaning) for column in COLUMNS]
    return f"{before}{BEGIN}\n{_table(('column', 'type', 'meaning'), rows)}\n{END}{rest.split(END, 1)[1]}"


BEGIN, END = "<!-- The table below is written by `make docs`. -->\n", "<!-- End of the written table. -->\n"


def strategies_page(text: str, conf_folder: str | Path) -> str:
    """Return `docs/strategies.md` with its table of strategies written anew; the rest of `text` stays.

    Raises:
        ConfigError: If the page has no place for the table.
    """
    if BEGIN not in text or END not in text:
        raise ConfigError("cannot write the table of strategies", "docs/strategies.md has no marks for it", BEGIN + END)
    before, rest = text.split(BEGIN, 1)
    table = _table(HEADINGS, [table_cells(row) for row in strategy_rows(Path(conf_folder))])
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}"


def write_pages(docs_folder: str | Path, conf_folder: str | Path) -> None:
    """Write `metrics.md`, `configuration.md`, and the tables in `strategies.md` and `control.md`.

    Raises:
        StorageError: If the folder cannot be written.
    """
    write_text(Path(docs_folder) / "metrics.md", metrics_page())
    write_text(Path(docs_folder) / "configuration.md", configuration_page(conf_folder))
    page = Path(docs_folder) / "strategies.md"
    write_text(page, strategies_page(page.read_text(encoding="utf-8"), conf_folder))
    page = Path(docs_folder) / "control.md"
    write_text(page, control_page(page.read_text(encoding="utf-8")))


if __name__ == "__main__":
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    write_pages(root / "docs", root / "conf")
