"""Every command and every Python example the documents print is run here, on small settings."""

import re
import shlex
from pathlib import Path

import pytest

import commands

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "experiments/README.md",
    *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")),
)
SMALL = {"run.py": ["task.n=2", "warmup=0", "max_new_tokens=24"], "compare.py": ["task.n=1", "warmup=0"],
         "overhead.py": ["task.n=1", "repeats=1"],
         "replay.py": ["task.n=1", "warmup=0", "max_new_tokens=12", "task.words=8", "plot=false"],
         "floors.py": ["repeats=1", "plot=false"],
         "load.py": ["clients=2", "seconds=1", "task.n=2", "serve.queue=8", "overflow=4"]}  # fmt: skip
PLACEHOLDER = re.compile(r"DIR|HUB_ID|FILE|=\?\?\?|…")


def blocks(language):
    for name in DOCUMENTS:
        path = ROOT / name
        if path.is_file():
            for found in re.finditer(rf"```{language}\n(.*?)```", path.read_text(), re.S):
                yield name, found[1]


def printed():
    """`python experiments/…` lines, once each; those that name the reader's own models are not runnable here."""
    seen = set()
    for _, block in blocks("(?:bash|sh|console)"):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.split("  #")[0].strip().removeprefix("$ ")
            if line.startswith("python experiments/") and not PLACEHOLDER.search(line) and line not in seen:
                seen.add(line)
                yield line


def test_there_are_commands():
    assert len(list(printed())) >= 3


@pytest.mark.parametrize("line", list(printed()))
def test_command_runs(line, tmp_path):
    _, script, *overrides = shlex.split(line)
    overrides = [o for o in overrides if not o.startswith(("task.n=", "output="))]
    small = [s for s in SMALL[Path(script).name] if "--help" not in overrides]
    output = [] if "--help" in overrides else [f"output={tmp_path / 'run'}"]
    done = commands.run(Path(script).name, *overrides, *small, *output, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if output:
        assert Path(done.stdout.strip().splitlines()[-1]).is_file()


@pytest.mark.parametrize(("name", "code"), list(blocks("python")))
def test_python_example_runs(name, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    exec(compile(code, name, "exec"), namespace)  # our own documents
    assert len(namespace) > 2
    assert "print(" not in code or capsys.readouterr().out.strip()


def test_make_targets_named_in_the_documents_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    for name in DOCUMENTS:
        for target in re.findall(r"`make ([a-z-]+)`", (ROOT / name).read_text()):
            assert target in targets, f"{name} names make {target}"
