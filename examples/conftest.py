"""The harness of these tests is test_sp.py's, as in full/: the ranks of a layout run beside the tests of one process."""

import pytest

import test_sp

MODULE = "examples.test_any"
test_sp.PRELOAD.extend([MODULE, "examples.train_wan_lora"])


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.module.__name__ == MODULE and "layout" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session", autouse=True)
def layouts_of_examples(request, tmp_path_factory):
    with test_sp.background_layouts(request.session.items, MODULE, tmp_path_factory.mktemp("layouts")) as function:
        yield function


@pytest.fixture
def ranks_of_layout(layouts_of_examples):
    return layouts_of_examples


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    test_sp.end_what_is_left()
