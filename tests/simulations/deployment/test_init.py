import ast
import importlib
import json
import ssl
import stat
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store

from fedpeat.client.site import read_site
from fedpeat.core import ConfigError
from simulations.deployment.certificates import make_authority, make_server_certificate
from simulations.deployment.command import deploy
from simulations.deployment.init import init
from simulations.deployment.layout import read_client_folder, read_deployment
from simulations.settings import load_settings

NAMES = ["names=[eve,ann]", "hosts=[server.example.org,10.0.0.7,2001:db8::1]", "port=8443"]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "held.jsonl"
    path.write_text('{"text": "abc"}\n')
    return path


@pytest.fixture(scope="module")
def words(held_out):
    return [*NAMES, "data=jsonl", f"data.path={held_out}", "rounds=3", "client.learning_rate=0.01"]


@pytest.fixture(scope="module")
def made(words, tmp_path_factory):
    return init(tmp_path_factory.mktemp("made") / "federation", words)


def test_it_can_be_read_again(made):
    again = read_deployment(made.folder)
    assert again == made
    assert again.names == ("ann", "eve")
    assert again.address == "server.example.org:8443"
    assert again.own_address == "127.0.0.1:8443"


def test_settings_are_those_of_a_simulation_but_for_where_data_is(made, held_out):
    settings = yaml.safe_load(made.config.read_text())
    simulated = load_settings(["data=jsonl", f"data.path={held_out}", "rounds=3", "client.learning_rate=0.01"])
    assert settings["data"] == {**simulated["data"], "path": None, "server_path": str(held_out)}
    same = set(simulated) - {"data", "cache"}
    assert {key: settings[key] for key in same} == {key: simulated[key] for key in same}


def test_nobody_else_can_read_a_key(made):
    keys = [path for path in made.folder.rglob("*") if path.name.endswith(".key") or path.name == "key"]
    assert len(keys) == 4
    for path in keys:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        assert b"PRIVATE KEY" in path.read_bytes()
    for path in set(made.folder.rglob("*")) - set(keys):
        assert not path.is_file() or b"PRIVATE KEY" not in path.read_bytes(), path
    assert stat.S_IMODE(made.folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("host", ["server.example.org", "localhost"])
def test_the_servers_certificate_is_good_for_its_names(made, host):
    authority = x509.load_pem_x509_certificate(made.ca.read_bytes())
    server = x509.load_pem_x509_certificate(made.certificate.read_bytes())
    policy = PolicyBuilder().store(Store([authority]))
    assert policy.build_server_verifier(x509.DNSName(host)).verify(server, []) == [server, authority]
    with pytest.raises(x509.verification.VerificationError):
        policy.build_server_verifier(x509.DNSName("elsewhere.example.org")).verify(server, [])


def test_and_for_its_addresses_and_not_from_another_authority(made):
    server = x509.load_pem_x509_certificate(made.certificate.read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    found = {str(address) for address in names.get_values_for_type(x509.IPAddress)}
    assert found == {"10.0.0.7", "2001:db8::1", "127.0.0.1", "::1"}
    stranger = x509.load_pem_x509_certificate(make_authority().public)
    verifier = PolicyBuilder().store(Store([stranger])).build_server_verifier(x509.DNSName("localhost"))
    with pytest.raises(x509.verification.VerificationError):
        verifier.verify(server, [])


def test_python_itself_trusts_it_with_its_key(made):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.certificate, made.key)
    ssl.create_default_context(cafile=str(made.ca))


def test_a_host_that_is_no_name_is_refused():
    with pytest.raises(ValueError, match="label"):
        make_server_certificate(make_authority(), ["https://ü"])


def test_each_client_has_a_key_of_its_own_that_the_server_knows(made):
    seen = set()
    for name in made.names:
        client = read_client_folder(made.client(name).folder)
        private = serialization.load_ssh_private_key(client.key.read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert private.curve.name == "secp384r1"
        known = serialization.load_ssh_public_key(made.public_key(name).read_bytes())
        assert private.public_key() == known
        assert client.public_key.read_bytes() == made.public_key(name).read_bytes()
        assert client.ca.read_bytes() == made.ca.read_bytes()
        assert read_site(client.site).name == name
        assert json.loads(client.site.read_text())["superlink"] == made.address
        seen.add(client.key.read_bytes())
    assert len(seen) == len(made.names)


def test_what_goes_to_a_client_holds_nothing_of_the_server(made):
    secrets = [made.key.read_bytes(), made.ca_key.read_bytes(), made.client("ann").key.read_bytes()]
    for path in made.client("eve").folder.rglob("*"):
        assert path.read_bytes() not in secrets


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_flower_takes_the_app(made):
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import load_and_validate

    config, warnings = load_and_validate(made.app / "pyproject.toml")
    assert not warnings
    assert config["project"]["dependencies"] == []
    assert len(build_fab_from_disk(made.app)) < 10_000
    for path in made.app.rglob("*.py"):
        names = [node.targets[0].id for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
        assert names == ([] if path.name == "__init__.py" else ["app"])


def test_the_apps_modules_are_the_installed_ones(made, monkeypatch):
    from simulations.deployment import relay as client_half
    from simulations.deployment import server_app as server_half

    monkeypatch.syspath_prepend(str(made.app))
    for name, half in (("client_app", client_half), ("server_app", server_half)):
        module = importlib.import_module(f"fedpeat_app.{name}")
        assert Path(module.__file__).is_relative_to(made.app)
        assert module.app is half.app
    for name in [name for name in sys.modules if name.startswith("fedpeat_app")]:
        monkeypatch.delitem(sys.modules, name)


def test_flowers_own_command_line_finds_the_server(made):
    config = tomllib.loads((made.home / "config.toml").read_text())
    assert config["superlink"]["fedpeat"] == {"address": "127.0.0.1:8443", "root-certificates": str(made.ca)}


def test_the_readme_names_the_commands_and_files_there_are(made):
    text = (made.folder / "README.md").read_text()
    for command in ("server", "client", "run", "status", "stop"):
        assert f"fedpeat deploy {command}" in text
    for name in ("config.yaml", "deployment.json", "app", "certificates", "keys", "clients/ann", "flower", "systemd"):
        assert name in text
        assert (made.folder / name).exists()


def test_insecure_is_only_when_asked_for(words, made, tmp_path):
    open_one = init(tmp_path / "open", words, insecure=True)
    assert not made.insecure
    assert open_one.insecure
    assert not [path for path in open_one.folder.rglob("*") if "key" in path.name or path.suffix == ".crt"]
    assert json.loads(open_one.client("ann").site.read_text())["insecure"]
    assert "Without TLS" in (open_one.folder / "README.md").read_text()


REFUSED = {
    "names": (["names=[ann,Ann]"], "two are the same"),
    "no names": (["names=null"], "needs clients"),
    "a path": (["names=[../ann]"], "cannot call a client"),
    "reserved": (["names=[server]"], "cannot call a client"),
    "port": (["port=70000"], "port"),
    "hosts": (["hosts=[https://ü]"], "hosts"),
    "pooled": (["clients.pool=true"], "one place"),
    "attacked": (["attack=nans"], "no harm"),
    "modelled": (["devices=mixed"], "real devices take is measured"),
    "whole model": (["baselines.whole_model=true"], "full model"),
    "alone": (["baselines.local_only=true"], "own model"),
    "extraction": (["baselines.extraction=true"], "not on the server"),
    "nothing": (["baselines.federated=false"], "nothing would run"),
    "count": (["clients.count=7"], "2 clients are named"),
    "two files": (["data.server_path=other.jsonl"], "each client names its own"),
    "docstrings": (["data=docstrings"], "of their own"),
    "no data": (["data.path=null"], "text to evaluate on"),
    "no key": (["roundz=3"], "no such key"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_written(case, words, tmp_path):
    more, told = REFUSED[case]
    keys = {word.partition("=")[0] for word in more}
    without = {"data", "data.path"} if case == "docstrings" else keys
    given = [word for word in words if word.partition("=")[0] not in without] + more
    with pytest.raises(ConfigError, match=told):
        init(tmp_path / "federation", given)
    assert not (tmp_path / "federation").exists()


def test_a_folder_with_something_in_it_is_left_alone(words, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        init(tmp_path, words)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_help_and_mistakes(capsys, tmp_path):
    assert deploy(["--help"]) == 0
    assert "usage: fedpeat deploy init" in capsys.readouterr().out
    for words, told in (
        (["strat", "x"], "start|stat"),
        (["run"], "needs a folder"),
        (["run", str(tmp_path)], "no deployment"),
        (["client", str(tmp_path)], "no client's folder"),
        (["run", str(tmp_path), "--insecure"], "no such flag"),
    ):
        with pytest.raises(ConfigError, match=told):
            deploy(words)


def test_a_clients_data_is_kept_and_mistakes_are_told(made, tmp_path, monkeypatch, capsys):
    import shutil
    import subprocess
    from concurrent.futures import ThreadPoolExecutor

    from simulations.deployment import command, processes
    from simulations.deployment.layout import read_client_folder

    folder = tmp_path / "ann"
    shutil.copytree(made.client("ann").folder, folder)
    with pytest.raises(ConfigError, match=r"data\.path"):
        deploy(["client", str(folder)])
    with pytest.raises(ConfigError, match="text_field"):
        deploy(["client", str(folder), "data.path=x.jsonl", "data.textfield=body"])
    with pytest.raises(ConfigError, match="no such file"):
        command._set_data(read_client_folder(folder), ["data.path=x.jsonl"])
    (tmp_path / "x y.jsonl").write_text("{}")
    monkeypatch.setattr(command, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))  # as far, in less time
    monkeypatch.setattr(processes, "worker", lambda _: subprocess.Popen(["sleep", "60"]))
    monkeypatch.setattr(processes, "supernode", lambda client: None)
    monkeypatch.setattr(processes, "stay", lambda *_: 0)
    monkeypatch.chdir(tmp_path)
    assert deploy(["client", str(folder), "data.path=x y.jsonl", "data.text_field=body"]) == 0
    kept = {"path": [str(tmp_path / "x y.jsonl")], "text_field": "body"}
    assert json.loads((folder / "site.json").read_text())["data"] == kept
    assert deploy(["client", str(folder)]) == 0
    assert deploy(["client", str(folder), f"data.path=[{tmp_path}/*.jsonl,{tmp_path}]"]) == 0
    assert json.loads((folder / "site.json").read_text())["data"]["path"] == [f"{tmp_path}/*.jsonl", str(tmp_path)]
