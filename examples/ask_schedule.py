"""Ask `POST /schedule` about a snapshot and print what was decided, in words.

    kairos serve --config examples/kairos.yaml &
    python examples/ask_schedule.py examples/schedule.json

Needs nothing but Python.
"""

import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def ask(url: str, snapshot: bytes) -> Any:
    """The decisions for a snapshot; ends the program with the problem's detail when it is refused."""
    request = urllib.request.Request(f"{url}/schedule", snapshot, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        sys.exit(f"{error.code}: {json.load(error)['detail']}")
    except urllib.error.URLError as error:
        sys.exit(f"{url} does not answer ({error.reason}); start it: kairos serve --config examples/kairos.yaml")


def describe(answer: Any) -> str:
    """The decisions as lines of text."""
    lines = [f"decision {answer['decision_id']} by strategy {answer['strategy']}"]
    for entry in answer["prefill"]:
        reason = entry["reason"]
        lines.append(
            f"  {entry['request_id']} on {entry['instance_id']}, place {entry['order']}: {reason['code']}, "
            f"{reason['ahead_s']:.3f} s of work ahead, first token predicted after {entry['predicted_ttft_s']:.3f} s, "
            + ("on time" if entry["on_time"] else "late")
        )
    for step in answer["decode"]:
        members = ", ".join(map(str, step["step"])) or "nobody"
        lines.append(f"  {step['instance_id']} admits {len(step['admit'])}, steps {members}")
    lines += [f"  {r['request_id']} rejected ({r['status']}): {r['reason']}" for r in answer["rejected"]]
    lines += [f"  note: {warning}" for warning in answer["warnings"]]
    return "\n".join(lines)


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit("usage: python examples/ask_schedule.py SNAPSHOT.json [URL]")
    address = sys.argv[2] if len(sys.argv) == 3 else "http://127.0.0.1:8011"
    print(describe(ask(address, Path(sys.argv[1]).read_bytes())))
