"""Files that somebody made to harm: each is refused in one sentence, and runs no code."""

import resource
import sys

import pytest


class Refused:
    """Asserts that a call refuses a file in one sentence, without a large allocation."""

    def __call__(self, call, match, most=2**29):
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises((ValueError, OSError), match=match) as raised:
            call()
        grown = unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        text = str(raised.value)
        assert "\n" not in text, text
        assert len(text) < 700, text
        assert grown < most


@pytest.fixture
def refused():
    return Refused()


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module of one function that records its calls: what a hostile file would have run."""
    (tmp_path / "trap_module.py").write_text(
        "import torch\n"
        "calls = ['imported']\n"
        "def spring(*args, **kwargs) -> torch.nn.Module:\n"
        "    calls.append('called')\n"
        "    return torch.nn.Linear(1, 1)\n"
        "class Trap(torch.nn.Module):\n"
        "    def __init__(self, **kwargs):\n"
        "        super().__init__()\n"
        "        calls.append('built')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "trap_module"
    assert "trap_module" not in sys.modules, sys.modules.pop("trap_module").calls
