"""Makes detector_cases importable for the tests in this folder, and keeps MMEngine from logging parameters."""

import sys
from pathlib import Path

import pytest
from mmengine.logging import MMLogger

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def no_log_of_every_parameter():
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('ERROR')
    yield
    logger.setLevel(level)
