"""The map's page with 50,000 points: its size, and its speed in a browser that draws with the processor alone.

Times depend on the machine and on what else runs there, so that only ratios of times in the same window are asserted;
what was measured is printed (pytest -s). `python -m tests.bench.bench_embedding` measures more, on an idle machine.
"""

import pytest

from tests.bench.bench_embedding import draw_times, first_paint, heap_mb, pan, write_page
from tests.helpers.browser import WHY_NO_BROWSER, open_browser
from tests.helpers.map_window import MapWindow

pytestmark = pytest.mark.slow
FEW, MANY = 5_000, 50_000


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    paths = {count: folder / f"{count}.html" for count in (FEW, MANY)}
    for count, path in paths.items():
        write_page(path, count)
    return paths


def test_page_of_50000_pictures_is_at_most_40_mb(pages):
    assert pages[FEW].stat().st_size <= 3e6
    assert pages[MANY].stat().st_size <= 40e6


@pytest.mark.skipif(WHY_NO_BROWSER != "", reason=WHY_NO_BROWSER)
def test_page_of_50000_points_opens_and_is_drawn_fast(pages):
    times = {}
    with open_browser() as browser:
        for count, path in pages.items():
            with MapWindow(browser, path) as window:
                paint, ready, loaded = first_paint(window)
                rate, longest = pan(window, 2)
                assert window.run("() => embeddingMap.points.count") == count
                assert len(window.shown_rows()) == count
                assert window.problems == []
                assert window.requests == [window.url]
                times[count] = draw_times(window, 5)
                draw, arc = times[count]
                print(f"{count} points: first paint after {paint:.0f} ms, drawn after {ready:.0f}, read after "
                      f"{loaded:.0f} ms; dragging at {rate:.0f} frames/s, the longest {longest:.0f} ms; one drawing "
                      f"{draw:.1f} ms, by arc() {arc:.1f} ms; heap {heap_mb(window):.0f} MB")
    # Thirty frames a second leave a canvas no time to draw 50,000 shapes: why the page writes pixels itself.
    draw, arc = times[MANY]
    assert arc > 3 * draw
    # Ten times the points cost at most ten times as much: no part of a drawing grows faster. Half again for noise.
    assert draw < 1.5 * MANY / FEW * times[FEW][0]
