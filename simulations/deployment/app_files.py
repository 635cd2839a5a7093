"""The Flower app that `flwr run` sends to each machine: three thin modules that use the installed `fedpeat`."""

from collections.abc import Mapping

from fedpeat import __version__

PACKAGE = "fedpeat_app"

# Flower reads these files without running them: `app` has to be a plain assignment.
_SERVER = '''"""The server's half, from the installed fedpeat."""

from simulations.deployment import server_app

app = server_app.app
'''
_CLIENT = '''"""A client's half, from the installed fedpeat: what hands messages to the worker of its machine."""

from simulations.deployment import relay

app = relay.app
'''


def app_files() -> Mapping[str, str]:
    """Return the app's files by name."""
    return {
        "pyproject.toml": f"""[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedpeat-app"
version = "{__version__}"
description = "A federation of fedpeat: what it does is in the installed package"
license = "Apache-2.0"
# Nothing is installed for a run: fedpeat is on each machine already.
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["{PACKAGE}"]

[tool.flwr.app]
publisher = "fedpeat"

[tool.flwr.app.components]
serverapp = "{PACKAGE}.server_app:app"
clientapp = "{PACKAGE}.client_app:app"

[tool.flwr.app.config]
folder = ""
""",
        f"{PACKAGE}/__init__.py": '"""A federation of fedpeat."""\n',
        f"{PACKAGE}/server_app.py": _SERVER,
        f"{PACKAGE}/client_app.py": _CLIENT,
    }
