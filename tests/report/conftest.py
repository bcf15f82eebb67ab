import pytest
from report_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)
