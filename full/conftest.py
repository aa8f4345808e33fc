"""Share fixtures among the tests in `full/`. Their harness, ranks and launches, is test_sp.py's."""

import contextlib
import sys

import pytest

import test_sp

sys.path.append(str(test_sp.GOLD))  # make_snapshot.py
test_sp.PRELOAD.extend(["full.train", "full.infer", "full.encode", "full.export", "make_snapshot"])


def module_with_layouts(item):
    """The name of a test's module, if it is of `full` and the test waits for the ranks of a layout."""
    name = item.module.__name__
    return name if name.startswith("full.") and "layout" in getattr(item, "fixturenames", ()) else None


def pytest_collection_modifyitems(items):
    """The ranks of layouts run beside the tests of one process: what waits for them comes last."""
    items.sort(key=lambda item: module_with_layouts(item) is not None)


@pytest.fixture(scope="session", autouse=True)
def modules_with_layouts(request, tmp_path_factory):
    """Return {module: function from a layout to (folder, exit codes)}."""
    items = request.session.items
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(test_sp.background_layouts(items, name, tmp_path_factory.mktemp("layouts")))
            for name in dict.fromkeys(filter(None, map(module_with_layouts, items)))
        }


@pytest.fixture
def ranks_of_layout(request, modules_with_layouts):
    return modules_with_layouts[request.module.__name__]


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    test_sp.end_what_is_left()


@pytest.fixture(scope="session")
def snapshot(tmp_path_factory):
    """A tiny one, complete, for text-to-video."""
    from make_snapshot import make_snapshot

    folder = tmp_path_factory.mktemp("snapshot") / "t2v"
    make_snapshot(folder, "t2v")
    return folder
