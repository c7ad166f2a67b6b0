"""Read pages as browsers do, and open them in one."""

import json
import shutil
import subprocess
from html.parser import HTMLParser

HOSTILE = "\"><script>alert('1')</script><img src=x onerror=alert(2)>&amp;"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Nothing that the browser does on its own: updates, first steps, guesses of addresses.
_QUIET = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
          "--disable-component-update", "--disable-sync", "--disable-extensions", "--disable-default-apps",
          "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--virtual-time-budget=2000")


class Tags(HTMLParser):
    """The tags and texts of a page, as a browser reads them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def read(path):
    return Tags(path.read_text(encoding="utf-8"))


def open_in_chromium(path, folder):
    """Open a page; return what was logged to the console, and the addresses that the page requested.

    folder:  for the browser's own files
    """
    log = folder / "requests.json"
    done = subprocess.run([CHROMIUM, *_QUIET, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}",
                           "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    events = json.loads(log.read_text(encoding="utf-8"))["events"]
    requests = [event["params"] for event in events if {"url", "initiator"} <= event.get("params", {}).keys()]
    # What the browser requests on its own account has no origin; the page itself is such a request too.
    addresses = {request["url"] for request in requests if request["initiator"] != "not an origin"}
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], addresses
