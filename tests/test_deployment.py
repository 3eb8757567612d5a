"""The recipes in server/ and clients/: what they promise about ports, secrets and silence, held against the files."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.flower import ENVIRONMENT

ROOT = Path(__file__).parents[1]
SERVER, CLIENT = ROOT / "server" / "superlink", ROOT / "clients" / "supernode"
LINK_SERVER, LINK_CLIENT, EXAMPLE = ROOT / "server" / "link", ROOT / "clients" / "link", ROOT / "server" / "example"
FLOWER_UNITS = [SERVER / "superlink.service", SERVER / "superexec.service", CLIENT / "supernode.service"]
UNITS = [*FLOWER_UNITS, LINK_SERVER / "serve.service", LINK_CLIENT / "join.service"]
CONTAINERFILES = [place / "Containerfile" for place in (SERVER, CLIENT, LINK_SERVER, LINK_CLIENT)]
SCRIPTS = sorted([*ROOT.glob("server/**/*.sh"), *ROOT.glob("clients/**/*.sh")])
READMES = [place / "README.md" for place in (SERVER, CLIENT, LINK_SERVER, LINK_CLIENT)]
SILENCE = {name: value for name, value in ENVIRONMENT.items() if name.startswith("FLWR_")}
HARDENED = {
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "CapabilityBoundingSet": "",
    "StateDirectoryMode": "0700",
    "UMask": "0077",
}


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def joined(text: str) -> str:
    """Return the text without its comments, with continued lines made one."""
    return re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", text, flags=re.M))


def unit(path: Path) -> dict[str, list[str]]:
    """Return the values of every key of a unit, in order; systemd allows a key many times."""
    values: dict[str, list[str]] = {}
    for line in joined(path.read_text()).splitlines():
        if line and not line.startswith("["):
            key, equals, value = line.partition("=")
            assert equals, f"{where(path)}: {line}"
            assert re.fullmatch(r"[A-Z]\w*", key), f"{where(path)}: {line}"
            values.setdefault(key, []).append(value)
    return values


def variables(text: str) -> dict[str, str]:
    """Return what an environment file sets."""
    pairs = [line.partition("=") for line in text.splitlines() if line and not line.startswith("#")]
    return {name: value for name, _, value in pairs}


def environment(path: Path) -> dict[str, str]:
    """Return the environment of a unit: its file's lines and its own."""
    values, found = unit(path), dict[str, str]()
    for name in values.get("EnvironmentFile", []):
        # Not optional (`-/etc/...`): without its file a service must not start, and report home.
        assert name.startswith("/etc/fedtune/")
        found |= variables((path.parent / Path(name).name).read_text())
    return found | variables("\n".join(values["Environment"]))


def command(path: Path) -> list[str]:
    """Return the command of a unit, without the folders of its program and its credentials."""
    (line,) = unit(path)["ExecStart"]
    line = line.replace("${CREDENTIALS_DIRECTORY}/", "/etc/fedtune/").replace("/opt/fedtune/bin/", "")
    return shlex.split(line)


@pytest.mark.parametrize("path", UNITS, ids=where)
def test_a_unit_runs_as_a_user_of_its_own_in_a_closed_sandbox(path: Path) -> None:
    values = unit(path)
    assert {key: values[key] for key in HARDENED} == {key: [value] for key, value in HARDENED.items()}
    (user,) = values["User"]
    assert user.startswith("fedtune")
    assert len({unit(other)["User"][0] for other in UNITS}) == len(UNITS)


@pytest.mark.parametrize("path", UNITS, ids=where)
def test_a_unit_silences_flower(path: Path) -> None:
    assert SILENCE.items() <= environment(path).items()


@pytest.mark.parametrize("path", CONTAINERFILES, ids=where)
def test_a_container_silences_flower_and_does_not_run_as_root(path: Path) -> None:
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.M)
    (block,) = re.findall(r"^ENV ((?:.*\\\n)*.*)$", text, re.M)
    assert SILENCE.items() <= variables("\n".join(block.replace("\\", "").split())).items()
    assert re.findall(r"^USER (\S+)$", text, re.M) == ["10001"]


def test_images_are_named_by_version() -> None:
    compose = yaml.safe_load((SERVER / "compose.yaml").read_text())
    images = [service["image"] for service in compose["services"].values()]
    images += [name for path in CONTAINERFILES for name in re.findall(r"^ARG BASE=(\S+)", path.read_text(), re.M)]
    images += re.findall(r"localhost/[\w:./-]+", "".join(path.read_text() for path in READMES))
    assert len(images) > 5
    assert not [name for name in images if not re.search(r":\d[\w.-]*$|@sha256:", name)]


def test_containers_run_what_the_units_run() -> None:
    services = yaml.safe_load((SERVER / "compose.yaml").read_text())["services"]
    for name in ("superlink", "superexec"):
        assert shlex.split(services[name]["command"]) == command(SERVER / f"{name}.service")
    (line,) = re.findall(r"^CMD exec (.*)$", joined((CLIENT / "Containerfile").read_text()), re.M)
    line = re.sub(r"\$\{FEDTUNE_SUPERLINK:\?[^}]*\}", "${FEDTUNE_SUPERLINK}", line)
    assert shlex.split(line) == command(CLIENT / "supernode.service")


def test_only_the_proxy_is_reached_from_outside() -> None:
    for path in FLOWER_UNITS:
        words = command(path)
        assert "--insecure" not in words
        assert [words[at + 1] for at, word in enumerate(words) if word == "--host"] in ([], ["127.0.0.1"])
        assert not [
            word for word in words if "0.0.0.0" in word or word.startswith(("--health", "--control", "--fleet"))
        ]
    superlink = command(SERVER / "superlink.service")
    assert {"--enable-supernode-auth", "--disable-runtime-dependency-installation", "process"} <= set(superlink)
    services = yaml.safe_load((SERVER / "compose.yaml").read_text())["services"]
    assert {name: service.get("ports") for name, service in services.items() if service.get("ports")} == {
        "superlink": ["443:443"]
    }
    assert all(services[name]["network_mode"] == "service:superlink" for name in ("superexec", "nginx"))


def test_the_proxy_passes_the_fleet_on_and_nothing_else() -> None:
    text = joined((SERVER / "nginx.conf").read_text())
    locations = dict(re.findall(r"location ([^{]+?) \{(.*?)\n    \}", text, re.S))
    assert set(locations) == {"/", "= /v1/fleet", "/v1/fleet/"}
    assert all(body.split() == ["return", "404;"] for name, body in locations.items() if name != "/v1/fleet/")
    fleet = dict(line.strip(" ;").split(maxsplit=1) for line in locations["/v1/fleet/"].splitlines() if ";" in line)
    # With the path: what nginx has matched goes up, not what it was sent.
    assert re.findall(r"proxy_pass (\S+);", text) == ["https://fedtune_superlink/v1/fleet/"]
    assert fleet["proxy_ssl_verify"] == "on"
    assert fleet["client_max_body_size"] == "16m"
    assert re.findall(r"listen ([^;]+);", text) == ["443 ssl"]
    assert re.findall(r"^\s*ssl_protocols ([^;]+);", text, re.M) == ["TLSv1.3"]
    assert text.count("{") == text.count("}")


def test_a_site_holds_its_supernode_to_the_bundle_it_accepted() -> None:
    values, settings = unit(CLIENT / "supernode.service"), environment(CLIENT / "supernode.service")
    writable = [f"/var/lib/{values['StateDirectory'][0]}", f"/var/cache/{values['CacheDirectory'][0]}"]
    assert "ReadWritePaths" not in values
    assert not settings["FLWR_HOME"].startswith(tuple(writable))
    assert "--allow-runtime-dependency-installation" not in command(CLIENT / "supernode.service")
    text = (CLIENT / "Containerfile").read_text()
    assert text.index("flwr install") < text.index("USER 10001")


def test_a_supernode_restarts_after_its_log_in_has_lapsed() -> None:
    values = unit(CLIENT / "supernode.service")
    assert values["Restart"] == ["always"]
    assert int(values["RestartSec"][0]) > 60  # two heartbeats of 30 s


def test_a_deployed_client_reads_its_own_file_only() -> None:
    words = command(CLIENT / "supernode.service")
    assert words[words.index("--node-config") + 1] == 'fedtune-site="/etc/fedtune/site.toml"'


@pytest.mark.parametrize("path", SCRIPTS, ids=where)
def test_a_script_can_be_run_and_stops_at_its_first_error(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert os.access(path, os.X_OK)
    assert lines[0] == "#!/bin/sh"
    assert next(line for line in lines if line and not line.startswith("#")) == "set -eu"
    assert subprocess.run(["sh", "-n", path], check=False).returncode == 0


@pytest.mark.parametrize("path", READMES, ids=where)
def test_every_file_that_a_readme_names_is_there(path: Path) -> None:
    text = path.read_text()
    named = set(
        re.findall(r"(?<![\w~/.-])[\w-][\w./-]*\.(?:sh|service|conf|env|yaml|toml|md|py)\b|\bContainerfile\b", text)
    )
    # what flwr calls connection.toml in its own folder, and the user's own experiment
    named -= {"config.toml", "recipe.toml"}
    places = (path.parent, SERVER, CLIENT, ROOT)
    missing = [name for name in named if not any((place / name).exists() for place in places)]
    assert len(named) >= 2
    assert not missing
    inside = {other.name for other in path.parent.iterdir() if other.is_file() and not other.name.startswith(".")}
    assert not {name for name in inside - {"README.md"} if name not in text and not name.endswith(".fab")}


def test_no_secret_lies_in_the_doors() -> None:
    for path in [*SERVER.rglob("*"), *CLIENT.rglob("*")]:
        if path.is_file() and not ignored(path):
            text = path.read_text()
            assert not re.search(r"-----BEGIN [A-Z ]*(PRIVATE KEY|CERTIFICATE)-----", text), where(path)
            assert not re.search(r"^[0-9a-f]{64}$", text, re.M), where(path)


def ignored(path: Path) -> bool:
    """Return whether the folder's own list keeps a file out of the repository."""
    rules = (SERVER / ".gitignore").read_text().splitlines()
    inside = path.relative_to(path.parents[len(path.relative_to(ROOT).parts) - 3])
    return any(path.match(rule) for rule in rules if rule.startswith("*")) or f"/{inside.parts[0]}/" in rules


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that certificates.sh has filled for fl.example.org and 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("certificates") / "made"
    made(folder, "fl.example.org", "127.0.0.1")
    return folder


def made(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    script = [str(SERVER / "certificates.sh"), str(folder), *names]
    return subprocess.run(script, capture_output=True, text=True, check=True)


@contextmanager
def listening(folder: Path, name: str) -> Iterator[int]:
    """Yield the port of a server that shows one of the certificates, to one caller."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / f"{name}.crt", folder / f"{name}.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)

        def answer() -> None:
            caller, _ = listener.accept()
            with caller, suppress(OSError):  # that the certificate was not liked is for the caller to say
                context.wrap_socket(caller, server_side=True).close()

        thread = threading.Thread(target=answer)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


def greeted(port: int, name: str, authority: Path) -> None:
    """Complete a handshake as a site does: against one authority, for one name."""
    context = ssl.create_default_context(cafile=str(authority))
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT  # the default from Python 3.13 on
    with socket.create_connection(("127.0.0.1", port)) as raw, context.wrap_socket(raw, server_hostname=name):
        pass


@pytest.mark.parametrize(
    ("file", "name"),
    [("public", "fl.example.org"), ("public", "127.0.0.1"), ("superlink", "localhost"), ("superlink", "127.0.0.1")],
)
def test_the_certificates_are_trusted_for_the_names_they_were_made_for(
    certificates: Path, file: str, name: str
) -> None:
    with listening(certificates, file) as port:
        greeted(port, name, certificates / "ca.crt")


@pytest.mark.parametrize(("file", "name"), [("public", "localhost"), ("superlink", "fl.example.org")])
def test_a_certificate_is_worth_nothing_under_another_name(certificates: Path, file: str, name: str) -> None:
    with listening(certificates, file) as port, pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        greeted(port, name, certificates / "ca.crt")


def test_keys_and_secrets_are_their_owners_alone(certificates: Path) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in certificates.iterdir()}
    secret = {"ca.key", "public.key", "superlink.key", "superexec.secret"}
    assert modes == dict.fromkeys(secret, 0o600) | dict.fromkeys(["ca.crt", "public.crt", "superlink.crt"], 0o644)


def test_a_renewal_keeps_the_authority_and_the_secret(tmp_path: Path, certificates: Path) -> None:
    folder = tmp_path / "made"
    shutil.copytree(certificates, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    made(folder, "fl.example.org", "127.0.0.1")
    kept = {name for name, content in before.items() if (folder / name).read_bytes() == content}
    assert kept == {"ca.crt", "ca.key", "superexec.secret"}
    with listening(folder, "public") as port:
        greeted(port, "fl.example.org", certificates / "ca.crt")


def test_certificates_refuse_what_is_no_name_and_make_nothing(tmp_path: Path) -> None:
    for names in ([], ["https://fl.example.org"], ["fl.example.org,DNS:*"], ["-config"], [""]):
        with pytest.raises(subprocess.CalledProcessError) as caught:
            made(tmp_path / "made", *names)
        assert "expected" in caught.value.stderr
        assert not (tmp_path / "made").exists()


def test_an_authority_without_its_key_is_not_replaced(tmp_path: Path, certificates: Path) -> None:
    shutil.copy(certificates / "ca.crt", tmp_path)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        made(tmp_path, "fl.example.org")
    assert "bring the key back" in caught.value.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ca.crt"]


def test_registration_refuses_what_is_no_folder(tmp_path: Path) -> None:
    script = [str(SERVER / "register.sh"), str(tmp_path / "absent")]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected one folder" in done.stderr


def scripted_flwr(folder: Path, replies: Mapping[str, str]) -> dict[str, str]:
    """Return an environment whose `flwr` says, for each site's name, what a SuperLink would."""
    lines = "".join(f"*'--name {name} '*) echo {shlex.quote(said)} ;;\n" for name, said in replies.items())
    program = folder / "bin" / "flwr"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncase "$* " in\n{lines}*) ;;\nesac\n')
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}


def test_registration_names_each_site_and_fails_for_a_bad_key_alone(tmp_path: Path) -> None:
    env = scripted_flwr(
        tmp_path,
        {
            "site-a": '{\n  "success": true,\n  "node-id": 1201567160414185623\n}',
            "site-b": '{"success": false, "error-message": "[code: 23] Public key already in use."}',
            "site-c": "Exit Code: 500",
        },
    )
    (tmp_path / "sites").mkdir()
    for name in ("site-a", "site-b", "site-c"):
        (tmp_path / "sites" / f"{name}.pub").touch()
    script = [str(SERVER / "register.sh"), str(tmp_path / "sites")]
    done = subprocess.run(script, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "site-a: registered, node-id: 1201567160414185623",
        "site-b: this SuperLink has its key since its start",
    ]
    assert done.stderr == "site-c: refused: Exit Code: 500\n"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def moved(text: str, places: Mapping[str, Any]) -> str:
    """Return the text of a recipe with its paths and ports replaced."""
    for old, new in places.items():
        text = text.replace(old, str(new))
    return text


@pytest.mark.slow  # 4 s
def test_a_superlink_behind_the_proxy_registers_keys_and_hides_everything_else(
    tmp_path: Path, certificates: Path
) -> None:
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None or shutil.which("ssh-keygen") is None or shutil.which("flower-superlink") is None:
        pytest.skip("needs nginx, ssh-keygen and flwr's commands on the path")
    inside, outside = free_port(), free_port()
    places = {"/etc/fedtune": certificates, "8000": inside, "443 ssl": f"127.0.0.1:{outside} ssl"}
    env = {**os.environ, **variables((SERVER / "superlink.env").read_text()), "FLWR_HOME": str(tmp_path / "flwr")}
    (tmp_path / "flwr").mkdir()
    (tmp_path / "flwr" / "config.toml").write_text(moved((SERVER / "connection.toml").read_text(), places))
    (tmp_path / "fedtune.conf").write_text(moved((SERVER / "nginx.conf").read_text(), places))
    temporary = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "main.conf").write_text(
        f"daemon off; master_process off; pid {tmp_path}/pid; error_log {tmp_path}/error.log; events {{}}\n"
        f"http {{ access_log off; {temporary} include {tmp_path}/fedtune.conf; }}\n"
    )
    (tmp_path / "sites").mkdir()
    keygen = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(tmp_path / "sites" / "site-a")]
    subprocess.run(keygen, check=True)
    superlink = [moved(word, places) for word in command(SERVER / "superlink.service")]
    with (
        (tmp_path / "log").open("w") as log,
        running(superlink, env=env, stdout=log, stderr=log),
        running([nginx, "-c", str(tmp_path / "main.conf")], stdout=log, stderr=log),
    ):
        register = [str(SERVER / "register.sh"), str(tmp_path / "sites")]
        done = subprocess.run(register, capture_output=True, text=True, check=False, env=env)
        assert re.fullmatch(r"site-a: registered, node-id: \d+\n", done.stdout), done.stderr
        for method, path, status in [
            ("POST", "/v1/fleet/pull-messages", 415),  # the SuperLink's own answer: not in its protocol
            ("GET", "/v1/fleet/pull-messages", 403),
            ("POST", "/v1/fleet", 404),
            ("POST", "/v1/control/list-runs", 404),
            ("POST", "/v1/fleet/../control/list-runs", 404),
            ("POST", "/v1/fleet/%2e%2e/control/list-runs", 404),
            ("POST", "/v1/fleet/..%2fcontrol/list-runs", 404),
            ("POST", "//v1/control/list-runs", 404),
            ("POST", "/v1/runtime/acquire-task", 404),
            ("GET", "/health", 404),
            ("GET", "/docs", 404),
        ]:
            assert asked(outside, certificates / "ca.crt", method, path) == status, (method, path)


@contextmanager
def running(words: list[str], **options: Any) -> Iterator[None]:
    """Keep a program running for a while."""
    process = subprocess.Popen(words, **options)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def asked(port: int, authority: Path, method: str, path: str) -> int:
    """Return the status of a request whose path is sent as it stands."""
    context = ssl.create_default_context(cafile=str(authority))
    with (
        socket.create_connection(("127.0.0.1", port)) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as link,
    ):
        link.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        return int(link.recv(64).split()[1])


def test_the_server_file_of_the_link_states_the_defaults() -> None:
    from dataclasses import asdict

    from fedtune.config.link import bind_server
    from fedtune.link.settings import EnrolmentSettings, LinkSettings

    stated = tomllib.loads((LINK_SERVER / "server.toml").read_text())
    for name, settings in (("link", LinkSettings()), ("enrolment", EnrolmentSettings())):
        defaults = asdict(settings)
        assert stated[name] == {key: defaults[key] for key in stated[name]}
    assert bind_server(LINK_SERVER / "server.toml")[:2] == (LinkSettings(), EnrolmentSettings())


def test_the_site_file_of_the_link_binds_with_a_policy() -> None:
    from fedtune.config.site import bind_site

    site = bind_site(LINK_CLIENT / "site.toml")
    assert site.link is not None
    assert site.link.address.endswith(":9000")
    assert site.policy.min_cohort == 3
    assert set(site.data.fields.values()) <= set(site.policy.columns)


def test_a_supervisor_does_not_repeat_what_somebody_must_mend() -> None:
    assert unit(LINK_SERVER / "serve.service")["RestartPreventExitStatus"] == ["1 2"]
    assert unit(LINK_CLIENT / "join.service")["RestartPreventExitStatus"] == ["2"]


def test_containers_of_the_link_run_what_the_units_run() -> None:
    for place, name in ((LINK_SERVER, "serve"), (LINK_CLIENT, "join")):
        (line,) = re.findall(r"^CMD (\[.*\])$", (place / "Containerfile").read_text(), re.M)
        (command_line,) = unit(place / f"{name}.service")["ExecStart"]
        wanted = command_line.replace("/opt/fedtune/bin/", "").replace(f"/var/lib/fedtune-{name}", "/var/lib/fedtune")
        assert json.loads(line) == shlex.split(wanted)


def test_one_port_of_a_coordinator_is_open() -> None:
    rules = (LINK_SERVER / "nftables.conf").read_text()
    assert "policy drop" in rules
    assert re.findall(r"tcp dport (\d+)", rules) == ["9000", "22"]
    # Whatever comes to the link's port passes the limits first.
    assert "tcp dport 9000 ct state new jump link" in rules


DIALS = """
import select, socket, sys
listener = socket.create_server(("127.0.0.1", 9000), backlog=1000)
def dial(source):
    end = socket.socket()
    end.setblocking(False)
    end.bind((source, 0))
    end.connect_ex(("127.0.0.1", 9000))
    return end
ends = [dial("127.0.0.2") for _ in range(200)]
select.select([], [], [], 0.3)
def through(end):
    return bool(select.select([], [end], [], 0)[1]) and not end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
print(sum(map(through, ends)), socket.create_connection(("127.0.0.1", 9000), 5, ("127.0.0.3", 0)) is not None)
"""


@pytest.mark.guarantee("G14")
@pytest.mark.slow
@pytest.mark.parametrize(("without", "least", "most"), [("ct count", 50, 60), ("limit rate", 64, 64)])
def test_the_firewall_limits_rate_and_number_of_one_source_alone(
    tmp_path: Path, without: str, least: int, most: int
) -> None:
    """Two hundred dials of one address: the first fifty, then ten a second; no more than 64 at once."""
    if shutil.which("nft") is None or shutil.which("unshare") is None:
        pytest.skip("needs nft and unshare")
    rules = (LINK_SERVER / "nftables.conf").read_text().replace("        iif lo accept\n", "")
    path, dials = tmp_path / "rules", tmp_path / "dials.py"
    path.write_text("".join(line for line in rules.splitlines(keepends=True) if f"saddr {without}" not in line))
    dials.write_text(DIALS)
    steps = f"ip link set lo up && nft -f {path} && {sys.executable} {dials}"
    done = subprocess.run(["unshare", "-rn", "sh", "-c", steps], capture_output=True, text=True, check=False)
    if done.returncode and "unshare" in done.stderr:
        pytest.skip("needs network namespaces for users")
    connected, other = done.stdout.split()
    assert least <= int(connected) <= most, done.stderr
    assert other == "True"


@pytest.mark.slow
def test_the_example_trains_three_institutions(tmp_path: Path) -> None:
    import json
    import sys

    from tests.link.federation import free_port

    fedtune = str(Path(sys.executable).parent / "fedtune")
    environment = {**os.environ, "FEDTUNE": fedtune}
    subprocess.run([EXAMPLE / "setup.sh", "fed"], cwd=tmp_path, env=environment, check=True, capture_output=True)
    again = subprocess.run(
        [EXAMPLE / "setup.sh", "fed"], cwd=tmp_path, env=environment, check=False, capture_output=True
    )
    assert again.returncode == 2
    port = free_port()
    for path in (tmp_path / "fed").glob("*/s*.toml"):
        path.write_text(path.read_text().replace(":9000", f":{port}"))
    server = tmp_path / "fed" / "server" / "server.toml"
    server.write_text(server.read_text() + 'health = ""\n')
    done = subprocess.run(
        [EXAMPLE / "run.sh", "fed"], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert "finished after round 3" in done.stdout
    told = subprocess.run(
        [fedtune, "status", "runs/example", "--json"], cwd=tmp_path / "fed", check=True, capture_output=True, text=True
    )
    clients = json.loads(told.stdout)["clients"]
    assert [(one["name"], one["rounds"]) for one in clients] == [("site-a", 3), ("site-b", 3), ("site-c", 3)]
