"""The command line: `fedpeat simulate`, `compare`, `study`, `control`, `deploy`, `report`, `pretrain`, `--version`."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Any

USAGE = """fedpeat: federated, parameter-efficient, emulator-assisted tuning of foundation models

usage: fedpeat COMMAND [overrides]

  fedpeat simulate [group=option ...] [key=value ...]   run a federation on this machine or a Ray cluster
  fedpeat simulate resume=FOLDER                        go on with a run that was killed or stopped
  fedpeat compare key=A,B [seeds=N] [key=value ...]     run variants with several seeds; say which is better
  fedpeat study emulator selection=A,B kept=N,M ...     run ways to stand in for the middle; say which is worth it
  fedpeat control fit|train|evaluate ...                learn who does what in a round; hold it against other rules
  fedpeat deploy init|server|client|run|status|stop     run a federation on several machines
  fedpeat report FOLDER                                 write a run's report anew, or compare the runs below
  fedpeat pretrain [key=value ...]                      make the embedded model anew, by its committed recipe
  fedpeat --version                                     print versions

'fedpeat COMMAND --help' lists all groups, options and keys.
"""

COMMANDS = ("simulate", "compare", "study", "control", "deploy", "report", "pretrain")
ELSEWHERE = {
    "compare": "simulations.compare.command:compare",
    "study": "simulations.study.command:study",
    "control": "simulations.control_command:control",
    "deploy": "simulations.deployment.command:deploy",
    "report": "simulations.compare.again:report",
}
"""Commands that have a module of their own, imported when they are asked for: `module:function`."""

CONFIG_ERROR, FAILURE, INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 a mistake in the config, 1 another failure, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in {"-h", "--help", "help"}:
        print(USAGE)
        return
    sys.exit(guarded(lambda: _dispatch(command, rest)))


def _dispatch(command: str, rest: list[str]) -> int:
    from fedpeat.core import ConfigError, nearest

    check_owners()
    if command == "--version":
        print_versions()
        return 0
    if command == "simulate":
        resumed = any(item.startswith("resume=") for item in rest)
        return _resume(rest) if resumed else hydra_command(rest, config_name="config", task=_simulate)
    if command in ELSEWHERE:
        module, function = ELSEWHERE[command].split(":")
        return getattr(importlib.import_module(module), function)(rest)
    if command == "pretrain":
        return hydra_command(rest, config_name="pretrain", task=_pretrain)
    raise ConfigError(f"fedpeat {command}", "no such command", nearest(command, COMMANDS))


def guarded(work: Callable[[], int]) -> int:
    """Return the exit code of `work`; an error is told on one screen, without a traceback unless FEDPEAT_DEBUG=1."""
    from fedpeat.core import ConfigError, FedPeatError

    try:
        return work()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except FedPeatError as error:
        _debug()
        tell(error.asked, error.found, error.remedy)
        return CONFIG_ERROR if isinstance(error, ConfigError) else FAILURE
    except MemoryError as error:
        _debug()
        tell("out of memory", str(error), "lower client.batch_size, evaluation.batch_size or engine.workers")
        return FAILURE
    except OSError as error:
        _debug()
        tell("the system refused an operation", str(error), "check space, permissions and limits; FEDPEAT_DEBUG=1")
        return FAILURE
    except Exception as error:
        _debug()
        tell(
            f"unexpected {type(error).__name__}: {error}",
            "this is a fault of fedpeat, or an input it should have refused",
            "run again with FEDPEAT_DEBUG=1 and report the traceback",
        )
        return FAILURE


def _debug() -> None:
    if os.environ.get("FEDPEAT_DEBUG") == "1":
        traceback.print_exc()


def tell(asked: str, found: str, remedy: str) -> None:
    """Print an error on stderr: what was asked, what was found, what to do."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())
    for label, style, text in (("error", "bold red", asked), ("found", "yellow", found), ("do", "green", remedy)):
        if text:
            console.print(Text.assemble((f"{label:>6}: ", style), text))


def hydra_command(rest: list[str], *, config_name: str, task: Callable[[Any], int]) -> int:
    """Hand over to Hydra after checking the overrides; return the worst exit code of its jobs."""
    import hydra
    from hydra import initialize_config_dir
    from hydra._internal.utils import get_args_parser
    from hydra.core.global_hydra import GlobalHydra

    from simulations.settings import check_overrides, conf_folder

    if not {"--help", "-h", "--hydra-help"} & set(rest):
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            check_overrides(get_args_parser().parse_args(rest).overrides, config_name=config_name)
        GlobalHydra.instance().clear()
    codes: list[int] = []

    def job(config: Any) -> None:
        codes.append(guarded(lambda: task(config)))
        if codes[-1]:
            sys.exit(codes[-1])

    sys.argv = [f"fedpeat {config_name}", *rest]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1" if os.environ.get("FEDPEAT_DEBUG") == "1" else "0")
    hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=config_name)(job)()
    return max(codes, default=0)


def _simulate(config: Any) -> int:
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from simulations.run import simulate
    from simulations.settings import to_settings

    summary = simulate(to_settings(config), Path(HydraConfig.get().runtime.output_dir))
    return INTERRUPTED if summary["status"] == "interrupted" else 0


def _resume(arguments: list[str]) -> int:
    from pathlib import Path

    from simulations.keeping import settings_to_resume
    from simulations.run import simulate

    folder = Path(next(item for item in arguments if item.startswith("resume=")).partition("=")[2])
    settings = settings_to_resume(folder, [item for item in arguments if not item.startswith("resume=")])
    return INTERRUPTED if simulate(settings, folder, resume=True)["status"] == "interrupted" else 0


def _pretrain(config: Any) -> int:
    from simulations.pretrain import pretrain
    from simulations.settings import to_settings

    pretrain(to_settings(config))
    return 0


def print_versions() -> None:
    """Print this package's version and those that results depend on."""
    from simulations.run import versions

    for name, number in versions().items():
        print(f"{name} {number}")


def check_owners() -> None:
    """Check that our application's top-level packages, which have common names, are ours alone.

    Raises:
        ConfigError: If another distribution installed a package of the same name over ours.
    """
    from fedpeat.core import ConfigError

    try:
        version("fedpeat")
    except PackageNotFoundError:
        return
    owners = packages_distributions()
    for package in ("strategies", "simulations"):
        others = sorted(set(owners.get(package, [])) - {"fedpeat"})
        if others:
            raise ConfigError(
                f"the package {package!r} must be fedpeat's own",
                f"{', '.join(others)} installed one of the same name",
                "install fedpeat in an environment of its own",
            )


if __name__ == "__main__":
    main()
