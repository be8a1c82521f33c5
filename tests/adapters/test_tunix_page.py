"""The Python code in docs/tunix.md runs as it stands there."""

import pathlib
import re

import pytest

from tests.adapters.quietly import import_quietly

pytest.importorskip("tunix", reason="google-tunix is not installed (the extra `tunix`)")
pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = (pathlib.Path(__file__).parents[2] / "docs/tunix.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "code", re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
)
def test_each_block_of_the_page_runs_alone(code):
    import_quietly("ferrum_jax.integrations.tunix")
    exec(compile(code, "tunix.md", "exec"), {})
