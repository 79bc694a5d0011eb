"""Before any test module is imported: transformers must find torchvision, or never will."""

import pytest

from tests import torchvision_reference


def pytest_configure() -> None:
    torchvision_reference.install()


@pytest.fixture(scope="session")
def torchvision() -> None:
    """Asked for by tests that compare with transformers' default processors."""
    reason = torchvision_reference.missing()
    if reason:
        pytest.skip(reason)
