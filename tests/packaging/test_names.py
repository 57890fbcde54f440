"""The distribution owns two import names and nothing else, and everything it needs at run time travels with it."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_top_folders_are_no_packages():
    """A folder without __init__.py never shadows PyPI's `parse` and `adapters`."""
    for folder in ("parse", "adapters", "conf", "experiments"):
        assert (ROOT / folder).is_dir()
        assert not (ROOT / folder / "__init__.py").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling", reason="hatchling builds the wheel; pip install -e '.[dev]'")
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)], cwd=ROOT, check=True,
        capture_output=True)  # fmt: skip
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        return {info.filename: info.file_size for info in archive.infolist()}


def test_the_wheel_owns_only_its_names(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"parsedec", "parsedec_adapters"}


def test_models_template_and_types_travel_with_it(wheel):
    for name in ("parsedec/py.typed", "parsedec/experiment/trace.html.j2",
                 "parsedec/reporting/report.html.j2", "parsedec/zoo/target/model.safetensors",
                 "parsedec/conf/config.yaml", "parsedec/conf/inner/pard.yaml",
                 "parsedec/conf/serve.yaml", "parsedec/serve/page.html",
                 "parsedec/zoo/target/judge.json", "parsedec/zoo/draft/tokenizer.json"):  # fmt: skip
        assert wheel.get(name) is not None, f"{name} is not in the wheel"
    assert sum(size for name, size in wheel.items() if "/zoo/" in name) < 40e6


def test_public_names_exist():
    import parsedec

    assert len(parsedec.__all__) == len(set(parsedec.__all__)) == len(parsedec._HOMES)
    assert all(hasattr(parsedec, name) for name in parsedec.__all__)


def test_whatever_a_command_can_choose_can_be_imported_by_its_name():
    """The parts of a stack; peers, adapters and what is made up for studies have packages of their own."""
    import parsedec

    groups = ("acceptance", "boundary", "gate", "judge", "loop", "outer", "segmenter")
    text = "".join(path.read_text() for group in groups for path in (ROOT / "conf" / group).glob("*.yaml"))
    targets = set(re.findall(r"^_target_: (parsedec\.[\w.]+)$", text, re.M))
    parts = {one for one in targets if not one.startswith(("parsedec.peers.", "parsedec.hardware."))}
    assert len(parts) > 20
    assert {part.rpartition(".")[2] for part in parts} <= set(parsedec.__all__)


def test_a_name_costs_nothing_until_it_is_used():
    seen = "import sys, parsedec; dir(parsedec); print('torch' in sys.modules, 'parsedec.engine' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", seen], cwd=ROOT / "parse", check=True, capture_output=True, text=True)
    assert told.stdout.split() == ["False", "False"]


def test_what_type_checkers_are_told_is_what_is_imported():
    import ast

    import parsedec

    (told,) = (node for node in ast.parse(Path(parsedec.__file__).read_text()).body if isinstance(node, ast.If))
    names = {alias.asname: f"{one.module}.{alias.name}" for one in told.body for alias in one.names}
    assert names == {name: f"parsedec.{home}.{name}" for name, home in parsedec._HOMES.items()}
    with pytest.raises(AttributeError, match="no attribute 'generate'"):
        _ = parsedec.generate


LIGHT = """
import runpy, sys
from pathlib import Path

for path in Path("experiments").glob("*.py"):
    if "run_command" in path.read_text():
        runpy.run_path(str(path), run_name="imported")
import parsedec.serve.command
sys.argv[:] = ["run.py", "judge.pth=packed"]
try:
    runpy.run_path("experiments/run.py", run_name="__main__")
except SystemExit as left:
    print(left.code, sorted({"torch", "transformers", "fastapi"} & set(sys.modules)))
"""


def test_help_and_a_misspelt_setting_wait_for_no_heavy_import():
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "2 []\n", done.stderr


def test_budgets():
    """Files of the packages stay readable: at most 400 lines, functions at most 60, or the exception says why here."""
    import ast

    long = []
    for path in [*ROOT.glob("parse/**/*.py"), *ROOT.glob("adapters/**/*.py"), *ROOT.glob("experiments/**/*.py")]:
        text = path.read_text()
        if text.count("\n") > 400:
            long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 60:
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1}")
    assert not long, "over budget:\n" + "\n".join(long)
