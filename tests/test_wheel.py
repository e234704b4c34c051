"""The wheel, in a clean environment outside the repository: what is needed is in it, and its commands run."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastbert

ROOT = Path(__file__).parents[1]


def call(*command: str | Path, cwd: Path, timeout: int = 600) -> str:
    """What a command prints, of a process that knows nothing of this checkout or its environment."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    kept |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=kept | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-4000:])
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands of an environment with the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", folder, cwd=folder)
    commands = folder / ("Scripts" if os.name == "nt" else "bin")
    pip = (commands / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    call(*pip, "-c", ROOT / "constraints.txt", f"{wheel}[plot,encode]", cwd=folder, timeout=1800)
    return commands


@pytest.mark.slow
def test_the_wheel_holds_both_packages_and_their_assets(wheel: Path) -> None:
    assert wheel.name == f"fastbert_triton-{fastbert.__version__}-py3-none-any.whl"
    held = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", "fastbert", "kernels"], cwd=ROOT, capture_output=True, text=True)
    assert {name.removeprefix("kernels/") for name in tracked.stdout.split()} <= held
    assert {name.split("/")[0] for name in held} == {
        "fastbert", "fastbert_kernels", f"fastbert_triton-{fastbert.__version__}.dist-info",
    }  # fmt: skip


@pytest.mark.slow
def test_its_commands_run(installed: Path, tiny: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "texts.txt").write_text("Rain is falling.\nWho left the window open?\n")
    python, command = installed / "python", installed / "fastbert"
    where = call(python, "-c", "import fastbert; print(fastbert.__file__)", cwd=tmp_path)
    assert where.strip().startswith(str(installed.parent))
    assert call(command, "--version", cwd=tmp_path) == f"fastbert {fastbert.__version__}\n"
    assert call(python, "-m", "fastbert", "--version", cwd=tmp_path) == f"fastbert {fastbert.__version__}\n"
    assert "runs as" in call(command, "env", cwd=tmp_path)
    assert "last_hidden_state" in call(command, "verify", model, "--text", "Hello", "--repeats", "1", cwd=tmp_path)
    said = call(command, "encode", model, "texts.txt", "--out", "out.parquet", cwd=tmp_path)
    assert "2 embeddings of 32 numbers: out.parquet" in said
    for out in ("a.html", "a.png"):
        assert "tokens: " in call(command, "attend", "Rain is falling.", "--model", model, "--out", out, cwd=tmp_path)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "addEventListener" in (tmp_path / "a.html").read_text()
