"""The table of back ends: light to import, and every line leads to a back end."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cac_fast.backend import BACKENDS
from cac_fast.backend.base import Backend


@pytest.mark.parametrize("name", BACKENDS)
def test_every_line_leads_to_a_back_end(name: str) -> None:
    entry = BACKENDS[name]
    assert entry.name == name
    assert entry.help and "\n" not in entry.help
    backend = entry.load()
    assert isinstance(backend, Backend)
    assert entry.load() is backend


def test_import_loads_no_triton_and_no_extension() -> None:
    program = "import sys, cac_fast.backend; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "cac_fast.backend" in loaded
    assert not loaded & {"triton", "cac_fast._C", "cac_fast._C_cuda", "cac_fast.backend.cuda"}
