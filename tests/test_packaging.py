"""The wheel holds all a run needs, and works from any directory."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_an_installed_wheel_composes_its_own_configuration_from_any_directory(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    shown = subprocess.run(
        [
            sys.executable,
            "-c",
            "from sslzoo.config import CONF, composed; print(CONF);"
            "print(composed(['method=moco_v2', 'scale=imagenet']).encoder.name)",
        ],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    conf, encoder = shown.stdout.split()
    assert conf == str(site / "sslzoo" / "conf")
    assert encoder == "resnet50"
