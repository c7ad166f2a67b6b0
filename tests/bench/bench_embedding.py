"""Time the page of an embedding in headless Chromium, which draws it with the processor, by the number of points.

    python -m tests.bench.bench_embedding [--counts 5000,50000] [--seconds 2] [--repeats N]

The points are made up, each with a picture of 64x64 pixels; the window is 1280x800. Prints one record per line,
`embedding/<points>`, and all of them as JSON in the last line.

first_paint_ms:  from the start of the page to its first contentful paint, which may be that of the heading alone;
                 median of `repeats` windows
ready_ms:        until the map is drawn for the first time; loaded_ms: until all of the page is read, with its pictures
draw_ms:         one drawing of all dots
arc_ms:          the same dots by a canvas's own arc() and fill(), one after the other, in the same window
frames_per_second, longest_frame_ms: while the mouse drags the whole map, on which all points are in view
heap_mb:         JavaScript's objects and arrays after that and a garbage collection
"""

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path

import numpy as np

from analysis.embedding_page import write_embedding_page
from analysis.embedding_report import report_html
from tests.bench.bench_ops import commit
from tests.helpers.browser import WHY_NO_BROWSER, Window, open_browser
from tests.helpers.made_embedding import make_embedding, make_mixtures, make_purity

# Draw all dots twice: as the page does, and by the canvas. Reading a pixel makes the browser carry out what it put off.
_DRAW_TWICE = """turns => {
  const {points, state} = embeddingMap, dots = document.getElementById("dots"), ours = [], plain = [];
  const canvas = document.createElement("canvas"), {left, top} = dots.getBoundingClientRect();
  [canvas.width, canvas.height] = [dots.width, dots.height];
  const context = canvas.getContext("2d", {alpha: false}), ratio = dots.width / dots.clientWidth;
  const places = points.names.map((_, row) => embeddingMap.pointOnScreen(row));
  const colors = Array.from(state.colors.pixels, pixel =>
    `rgb(${pixel & 255} ${pixel >>> 8 & 255} ${pixel >>> 16 & 255})`);
  const rows = [...colors.keys()].sort((a, b) => (colors[a] < colors[b] ? -1 : colors[a] > colors[b] ? 1 : a - b));
  const radius = points.count > 20000 ? 1.75 : 2.5;  // those of the page, see view.mjs
  for (let turn = 0; turn <= turns; turn++) {
    let start = performance.now();
    embeddingMap.draw();
    dots.getContext("2d").getImageData(0, 0, 1, 1);
    ours.push(performance.now() - start);
    start = performance.now();
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.fillStyle = state.theme.paper;
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.globalAlpha = 0.6;
    for (const row of rows) {
      context.fillStyle = colors[row];
      context.beginPath();
      context.arc(places[row].x - left, places[row].y - top, radius, 0, 2 * Math.PI);
      context.fill();
    }
    context.getImageData(0, 0, 1, 1);
    plain.push(performance.now() - start);
  }
  return [ours.slice(1), plain.slice(1)];
}"""
# Move the pointer that is down in circles, once per frame; return frames drawn, ms passed, and the longest frame.
_DRAG = """seconds => new Promise(done => {
  const canvas = document.getElementById("marks"), box = canvas.getBoundingClientRect(), times = [];
  const drawn = embeddingMap.frames, start = performance.now();
  requestAnimationFrame(function move(time) {
    times.push(time);
    const passed = performance.now() - start, angle = passed / 300;
    if (passed >= seconds * 1000) {
      const longest = Math.max(...times.slice(1).map((each, index) => each - times[index]));
      done([embeddingMap.frames - drawn, passed, longest]);
      return;
    }
    canvas.dispatchEvent(new PointerEvent("pointermove", {pointerId: 1, pointerType: "mouse", buttons: 1, bubbles: true,
      clientX: box.left + box.width / 2 + 50 * Math.cos(angle),
      clientY: box.top + box.height / 2 + 50 * Math.sin(angle)}));
    requestAnimationFrame(move);
  });
})"""


def write_page(path: Path, count: int) -> None:
    """Write a page of made-up points: four tenths real, half synthetic, a tenth projected, all with pictures."""
    embedding = make_embedding(count * 4 // 10, count // 2, count // 10, side=64, hidden=())
    report = report_html(embedding, make_mixtures(embedding), make_purity(), [])
    write_embedding_page(path, embedding, report, workers=None)


def first_paint(window: Window) -> tuple[float, float, float]:
    """Return first_paint_ms, ready_ms and loaded_ms of a page that was opened."""
    window.wait("() => performance.getEntriesByName('first-contentful-paint').length"
                " && performance.getEntriesByType('navigation')[0].loadEventEnd")
    return tuple(window.run("() => [performance.getEntriesByName('first-contentful-paint')[0].startTime, "
                            "embeddingMap.ready, performance.getEntriesByType('navigation')[0].loadEventEnd]"))


def draw_times(window: Window, turns: int) -> tuple[float, float]:
    """Return draw_ms and arc_ms, medians of drawings that take turns."""
    ours, plain = window.run(_DRAW_TWICE, turns)
    return statistics.median(ours), statistics.median(plain)


def pan(window: Window, seconds: float) -> tuple[float, float]:
    """Drag the map in circles; return frames per second in which it was drawn anew, and the longest ms between two.

    The moves come from a script, one per frame: those of playwright take longer than a frame, and would be measured.
    """
    box = window.page.locator("#marks").bounding_box()
    window.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    window.page.mouse.down()
    drawn, passed, longest = window.run(_DRAG, seconds)
    assert drawn > 0, "the map does not follow the pointer"
    window.page.mouse.up()
    return drawn / passed * 1000, longest


def heap_mb(window: Window) -> float:
    """Return the size of JavaScript's objects and arrays, after a garbage collection."""
    session = window.context.new_cdp_session(window.page)
    session.send("HeapProfiler.collectGarbage")
    used = session.send("Runtime.getHeapUsage")
    return (used["usedSize"] + used.get("backingStorageSize", 0)) / 1e6


def measure(browser, path: Path, count: int, seconds: float, repeats: int) -> dict:
    """Open a page several times, and use the last window; return a record."""
    opened = []
    for _ in range(repeats - 1):
        with Window(browser, path) as window:
            opened.append(first_paint(window))
    with Window(browser, path) as window:
        opened.append(first_paint(window))
        rate, longest = pan(window, seconds)
        draw, arc = draw_times(window, 5)
        heap = heap_mb(window)
    paint, ready, loaded = map(float, np.median(opened, axis=0))
    record = {"name": f"embedding/{count}", "bytes": path.stat().st_size,
              "first_paint_ms": paint, "ready_ms": ready, "loaded_ms": loaded,
              "frames_per_second": rate, "longest_frame_ms": longest,
              "draw_ms": draw, "arc_ms": arc, "arc_over_draw": arc / draw, "heap_mb": heap}
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in record.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", default="5000,50000", help="of points, separated by commas (default: 5000,50000)")
    parser.add_argument("--seconds", type=float, default=2, help="of dragging (default: 2)")
    parser.add_argument("--repeats", type=int, default=5, help="windows that are opened (default: 5)")
    options = parser.parse_args()
    if WHY_NO_BROWSER:
        print(json.dumps({"records": [], "why": WHY_NO_BROWSER}))
        return
    records = []
    with tempfile.TemporaryDirectory() as folder:
        pages = {count: Path(folder) / f"{count}.html" for count in map(int, options.counts.split(","))}
        for count, path in pages.items():
            write_page(path, count)
        with open_browser() as browser:
            for count, path in pages.items():
                record = measure(browser, path, count, options.seconds, options.repeats)
                print(f"{record['name']:16} {record['bytes'] / 1e6:6.2f} MB  first paint "
                      f"{record['first_paint_ms']:5.0f} ms  ready {record['ready_ms']:5.0f} ms  "
                      f"{record['frames_per_second']:5.1f} frames/s  drawing {record['draw_ms']:5.1f} ms, "
                      f"{record['arc_over_draw']:.1f} times as fast as by arc()  heap {record['heap_mb']:.0f} MB",
                      flush=True)
                records.append(record)
            version = browser.version
    print(json.dumps({"records": records, "seconds": options.seconds, "repeats": options.repeats, "browser": version,
                      "device": platform.processor() or platform.machine(), "commit": commit()}))


if __name__ == "__main__":
    main()
