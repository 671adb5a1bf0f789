"""The trainings that several tests here start from, and the import of what stands next to them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope='session')
def small_data(tmp_path_factory):
    from small_training import make_data

    return make_data(tmp_path_factory.mktemp('small_training') / 'data')


@pytest.fixture(scope='session')
def training_server():
    from small_training import TrainingServer

    server = TrainingServer()
    yield server
    server.close()


@pytest.fixture(scope='session')
def undisturbed(small_data, training_server):
    """The folder of a training from beginning to end, and the seconds it took."""
    import time

    from small_training import arguments

    work_dir = small_data.parent / 'undisturbed'
    start = time.monotonic()
    answer = training_server.run(arguments(small_data, work_dir), log := work_dir.with_suffix('.log'))
    assert answer['status'] == 0, log.read_text()[-3000:]
    return work_dir, time.monotonic() - start
