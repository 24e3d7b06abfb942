"""Writes a modelled timeline as a trace for Perfetto (ui.perfetto.dev) or `chrome://tracing`.

The format is Chrome's: complete events (`"ph": "X"`) with microseconds, one thread for compute and
one for communication; metadata events (`"ph": "M"`) name them.
"""

import json
from collections.abc import Iterator
from typing import Any

from ._timeline import Block, Timeline

_THREADS = ("compute", "communication, exposed", "communication, hidden")


def to_trace(timeline: Timeline, mesh: str) -> str:
    """Returns a trace of one device and step on a mesh, given as text, as JSON."""
    names = [_metadata("process_name", 0, f"{timeline.chip}, mesh ({mesh}): modelled step")]
    names += [_metadata("thread_name", number, name) for number, name in enumerate(_THREADS)]
    about = {"chip": timeline.chip, "mesh": mesh, "label": timeline.label}
    about |= {"model": timeline.source, "assumptions": "; ".join(timeline.assumptions)}
    events = [*names, *map(_event, timeline.blocks())]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": about})


def _metadata(what: str, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": 0, "tid": thread, "name": what, "args": {"name": name}}


def _event(block: Block) -> dict[str, Any]:
    segment = block.segment
    communicates = segment.kind != "compute"
    over = f" over {', '.join(segment.axes) or 'no axis'}" if communicates else ""
    return {
        "ph": "X",
        "pid": 0,
        "tid": communicates + block.hidden,
        "ts": block.start * 1e6,
        "dur": block.seconds * 1e6,
        "name": f"{segment.scope or segment.phase}{over}",
        "cat": f"{segment.kind},{segment.phase}",
        "args": dict(_arguments(block)),
    }


def _arguments(block: Block) -> Iterator[tuple[str, str]]:
    segment = block.segment
    yield from (("phase", segment.phase), ("scope", segment.scope), ("source", segment.where))
    yield "seconds of all its trips", f"{segment.seconds:.4g}"
