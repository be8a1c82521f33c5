"""The Python code in README.md and docs/ runs as it stands there, and links lead somewhere."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Pages about other packages; `tests/adapters` runs their code beside these.
ADAPTERS = {"tunix.md"}
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in PAGES}
BLOCKS = [
    pytest.param(name, code, id=f"{name} block {number}")
    for name, text in TEXTS.items()
    if name not in ADAPTERS
    for number, code in enumerate(
        re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    )
]


@pytest.mark.parametrize(("name", "code"), BLOCKS)
def test_each_python_block_of_a_page_runs_alone(name, code):
    exec(compile(code, name, "exec"), {})


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_each_link_of_a_page_leads_to_a_file_and_a_heading(path):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXTS[path.name]):
        file, _, heading = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [text.lower().replace(" ", "-") for text in headings], target


@pytest.mark.parametrize("name", ["main-job", "test-command"])
def test_the_readme_marks_the_command_that_ci_runs(name):
    assert re.search(rf"^<!-- {name} -->\n```bash\n.+\n```$", TEXTS["README.md"], re.MULTILINE)
