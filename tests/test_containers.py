"""Container files, compose files, chart and units, held against the tools that read them where one is installed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CONTAINERFILES = sorted(ROOT.glob("*/*/Containerfile"))
RUN_HERE = [path for path in CONTAINERFILES if path.parent.name != "edge"]
COMPOSE = sorted(ROOT.glob("*/*/compose.yaml"))
UNITS = sorted([*ROOT.glob("server/**/*.service"), *ROOT.glob("clients/**/*.service")])
CHART, LINK = ROOT / "server" / "helm", ROOT / "server" / "link"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILDERS = ("podman", "buildah", "docker")


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return each instruction of a container file with its arguments, continued lines made one, arguments filled in."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.M)
    pairs = [line.split(maxsplit=1) for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]
    given = dict(rest.split("=", 1) for word, rest in pairs if word == "ARG" and "=" in rest)
    return [(word, re.sub(r"\$\{(\w+)\}", lambda m: given.get(m[1], m[0]), rest)) for word, rest in pairs]


def copied(path: Path) -> Iterator[str]:
    """Yield what a container file copies from the repository."""
    for word, rest in instructions(path):
        if word in {"COPY", "ADD"} and "--from=" not in rest:
            yield from rest.split()[:-1]


def output(command: Sequence[str | Path]) -> str:
    """Return what a tool printed; fail with it if the tool did."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.parametrize("path", CONTAINERFILES, ids=where)
def test_what_a_container_file_copies_is_there_and_reaches_the_builder(path: Path) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    kept = [rule[1:] for rule in rules if rule.startswith("!")]
    for name in copied(path):
        assert (ROOT / name).exists(), name
        assert any(name == rule or name.startswith(f"{rule}/") for rule in kept), f"{name} is ignored"
    assert not [name for name in kept if re.search(r"\.(key|crt|secret|env)$|certificates|identity", name)]
    assert not any(word == "ADD" for word, _ in instructions(path))


@pytest.mark.parametrize("path", CONTAINERFILES, ids=where)
def test_a_container_file_installs_extras_that_exist(path: Path) -> None:
    extras = re.findall(r"(?<!\w)[./\w]*source\[([\w,-]+)\]", path.read_text())
    assert {name for text in extras for name in text.split(",")} <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("path", CONTAINERFILES, ids=where)
def test_every_stage_starts_from_a_version_or_from_another_stage(path: Path) -> None:
    stages: list[str] = []
    for word, rest in instructions(path):
        if word == "FROM":
            image, *name = rest.split()
            assert image in {*stages, "scratch"} or re.search(r":\d[\w.-]*$|@sha256:", image), image
            stages += name[1:]
        for source in re.findall(r"--from=(\S+)", rest):
            assert source in stages, source


@pytest.mark.parametrize("path", RUN_HERE, ids=where)
def test_an_image_runs_as_a_number_that_is_not_root_and_its_environment_holds_no_installer(path: Path) -> None:
    words = [word for word, _ in instructions(path)]
    last = len(words) - 1 - words[::-1].index("USER")
    assert instructions(path)[last][1] == "10001"  # Kubernetes cannot hold a name against runAsNonRoot
    assert not {"RUN", "COPY"} & set(words[last:])
    (install,) = [rest for word, rest in instructions(path) if word == "RUN" and "pip install" in rest]
    assert "--no-cache-dir" in install
    assert "pip uninstall --yes pip" in install


@pytest.mark.slow  # minutes, and the packages of each image
@pytest.mark.parametrize("path", RUN_HERE, ids=where)
def test_an_image_is_built_and_says_its_version(path: Path) -> None:
    builder = next((name for name in BUILDERS if shutil.which(name) and works(name)), None)
    if builder is None:
        pytest.skip("needs podman, buildah or a docker with its daemon")
    base = next(
        rest.split("=", 1)[1] for word, rest in instructions(path) if word == "ARG" and rest.startswith("BASE=")
    )
    if subprocess.run([builder, "pull", base], capture_output=True, check=False).returncode:
        pytest.skip(f"needs {base}, which no registry here has")
    name = f"localhost/fedtune-test-{path.parent.name}:1.0"
    output([builder, *(["bud"] if builder == "buildah" else ["build"]), "-t", name, "-f", path, "."])
    if builder != "buildah":
        said = output([builder, "run", "--rm", "--read-only", "--network", "none", name, "fedtune", "--version"])
        assert PROJECT["version"] in said


def works(builder: str) -> bool:
    return subprocess.run([builder, "info"], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("path", COMPOSE, ids=where)
def test_compose_accepts_the_file(path: Path) -> None:
    tool = next((words for words in (["docker", "compose"], ["docker-compose"]) if has_compose(words)), None)
    if tool is None:
        pytest.skip("needs docker compose")
    output([*tool, "-f", path, "config", "--quiet"])


def has_compose(words: Sequence[str]) -> bool:
    if shutil.which(words[0]) is None:
        return False
    done = subprocess.run([*words, "version", "--short"], capture_output=True, text=True, check=False)
    return done.returncode == 0 and not done.stdout.startswith("1.")


@pytest.mark.parametrize("path", COMPOSE, ids=where)
def test_our_containers_are_closed(path: Path) -> None:
    services = yaml.safe_load(path.read_text())["services"]
    ours = {name: service for name, service in services.items() if "build" in service}
    assert ours
    for name, service in ours.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["image"].endswith(f":{PROJECT['version']}"), name
        assert (path.parent / service["build"]["context"] / service["build"]["dockerfile"]).is_file(), name


def test_the_coordinators_container_publishes_the_port_that_it_listens_on() -> None:
    (service,) = yaml.safe_load((LINK / "compose.yaml").read_text())["services"].values()
    link = tomllib.loads((LINK / "server.toml").read_text())["link"]
    assert service["ports"] == [f"443:{link['listen'].rpartition(':')[2]}"]
    assert f"http://{link['health']}/healthz" in service["healthcheck"]["test"][-1]
    assert int(service["stop_grace_period"].removesuffix("s")) > link["drain_s"]
    (command,) = [rest for word, rest in instructions(LINK / "Containerfile") if word == "CMD"]
    mounted = [text.split(":")[1] for text in service["volumes"]]
    assert all(any(word.startswith(place) for place in mounted) for word in json.loads(command)[1:])


def test_a_coordinator_can_write_where_a_renewed_certificate_goes() -> None:
    (service,) = yaml.safe_load((LINK / "compose.yaml").read_text())["services"].values()
    assert "./identity:/etc/fedtune/identity" in service["volumes"]  # not :ro
    (line,) = re.findall(r"^ReadWritePaths=(.*)$", (LINK / "serve.service").read_text(), re.M)
    server = tomllib.loads((LINK / "server.toml").read_text())
    folders = [server["link"]["identity"], server["enrolment"]["folder"]]
    assert line.split() == [f"-/etc/fedtune/{folder}" for folder in folders]


def test_the_chart_is_of_this_version_and_runs_the_same_container() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert chart["appVersion"] == PROJECT["version"]
    assert values["image"].endswith(f"/fedtune-serve:{PROJECT['version']}")
    template = (CHART / "templates" / "coordinator.yaml").read_text()
    assert re.findall(r"\.Values\.(\w+)", template)
    assert set(re.findall(r"\.Values\.(\w+)", template)) == set(values)


def test_helm_renders_a_coordinator_that_is_closed(tmp_path: Path) -> None:
    if shutil.which("helm") is None:
        pytest.skip("needs helm")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('model = { base = "base" }\nmethod = { name = "flora" }\n')
    files = ["--set-file", f"recipe={recipe}", "--set-file", f"server={LINK / 'server.toml'}"]
    output(["helm", "lint", "--strict", CHART, *files])
    rendered = {one["kind"]: one for one in yaml.safe_load_all(output(["helm", "template", "care", CHART, *files]))}
    assert set(rendered) == {"ConfigMap", "Service", "StatefulSet"}
    assert rendered["ConfigMap"]["data"]["recipe.toml"].strip() == recipe.read_text().strip()
    assert tomllib.loads(rendered["ConfigMap"]["data"]["server.toml"])["link"]["listen"] == "0.0.0.0:9000"
    pod = rendered["StatefulSet"]["spec"]["template"]["spec"]
    assert rendered["StatefulSet"]["spec"]["replicas"] == 1
    assert pod["securityContext"]["runAsUser"] == 10001
    assert not pod["automountServiceAccountToken"]
    mounts = {place["mountPath"]: place.get("readOnly", False) for place in pod["containers"][0]["volumeMounts"]}
    assert [path for path, is_closed in mounts.items() if not is_closed] == [
        "/var/lib/fedtune",
        "/etc/fedtune/identity",
        "/tmp",
    ]
    for container in [*pod["initContainers"], *pod["containers"]]:
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_helm_refuses_a_coordinator_without_a_recipe() -> None:
    if shutil.which("helm") is None:
        pytest.skip("needs helm")
    done = subprocess.run(["helm", "template", "care", CHART], capture_output=True, text=True, check=False)
    assert done.returncode
    assert "expected recipe and server; add --set-file recipe=recipe.toml" in done.stderr


@pytest.fixture(scope="module")
def unit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with every unit and its drop-ins; the programs that they start are there, as systemd wants to see."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    folder = tmp_path_factory.mktemp("units")
    for path in UNITS:
        text = path.read_text()
        for program in re.findall(r"(?:^|=-?)(/(?:opt/fedtune|usr/local)/bin/[\w.-]+)", text, re.M):
            stand_in = folder / "bin" / Path(program).name
            stand_in.parent.mkdir(exist_ok=True)
            stand_in.touch(0o755)
            text = text.replace(program, str(stand_in))
        (folder / path.name).write_text(text)
    drop_in = folder / "serve.service.d" / "port-443.conf"
    drop_in.parent.mkdir()
    shutil.copy(LINK / "port-443.conf", drop_in)
    return folder


def test_systemd_accepts_every_unit(unit_folder: Path) -> None:
    assert len(UNITS) >= 6
    said = output(["systemd-analyze", "verify", "--man=no", *sorted(unit_folder.glob("*.service"))])
    # It loads what the host has besides, and may complain about that.
    assert not [line for line in said.splitlines() if fnmatch(line, f"*{unit_folder}*") or line.startswith("serve")]


@pytest.mark.parametrize("path", UNITS, ids=where)
def test_systemd_counts_a_unit_as_little_exposed(unit_folder: Path, path: Path) -> None:
    said = output(["systemd-analyze", "security", "--offline=true", unit_folder / path.name])
    (exposure,) = re.findall(r"Overall exposure level for \S+: ([\d.]+)", said)
    assert float(exposure) <= 2.0  # of 10


def test_the_drop_in_for_port_443_allows_that_and_nothing_else() -> None:
    lines = [line for line in (LINK / "port-443.conf").read_text().splitlines() if line and not line.startswith("#")]
    right = "CAP_NET_BIND_SERVICE"
    assert lines == ["[Service]", f"CapabilityBoundingSet={right}", f"AmbientCapabilities={right}"]
