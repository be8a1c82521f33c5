"""What the README shows runs as it stands there."""

import pathlib
import re

import pytest

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", BLOCKS, ids=[f"block {i}" for i in range(len(BLOCKS))])
def test_each_python_block_of_the_readme_runs_alone(code):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("name", ["main-job", "test-command"])
def test_the_readme_marks_the_command_that_ci_runs(name):
    assert re.search(rf"^<!-- {name} -->\n```bash\n.+\n```$", README, re.MULTILINE)
