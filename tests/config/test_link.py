from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.config.link import bind_link
from fedtune.errors import ConfigError
from fedtune.link.settings import LinkSettings


def test_without_a_file_everything_has_its_default() -> None:
    assert bind_link(None) == (LinkSettings(), Path.cwd())


def test_a_file_and_the_command_line_are_bound_and_paths_start_at_the_file(tmp_path: Path) -> None:
    path = tmp_path / "server.toml"
    path.write_text('[link]\nlisten = "127.0.0.1:1"\nmax_concurrent_uploads = 2\n')
    settings, root = bind_link(path, ('link.listen="127.0.0.1:2"',))
    assert (settings.listen, settings.max_concurrent_uploads, root) == ("127.0.0.1:2", 2, tmp_path)


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "server.toml"
    path.write_text("more = 1\n[link]\nuplods = 2\nwindow_mib = 0\nlisten = 3\n")
    with pytest.raises(ConfigError) as caught:
        bind_link(path)
    assert len(caught.value.faults) == 4
    assert "uploads" in str(caught.value)
    path.write_text("[link]\nuploads = 2\n")
    with pytest.raises(ConfigError, match=r"link\.uploads: unknown key; did you mean link\.max_concurrent_uploads\?"):
        bind_link(path)
    with pytest.raises(ConfigError, match="none at"):
        bind_link(tmp_path / "none.toml")
