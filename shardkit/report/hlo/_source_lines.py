"""Reads which line of code each instruction of a compiled program comes from.

The text opens with four tables, and an instruction's metadata has a number into the last one:

    FileNames             1 "/home/me/model.py"
    FunctionNames         1 "attend"
    FileLocations         1 {file_name_id=1 function_name_id=1 line=42 end_line=42 column=8 …}
    StackFrames           1 {file_location_id=1 parent_frame_id=1}
    … metadata={op_name="jit(step)/dot_general" stack_frame_id=1}

Where `jax_include_full_tracebacks_in_locations` is off, the table of functions has the paths of JAX
scopes, of which an instruction's own is only the end, and no frame has a caller.

Older compilers write `source_file="…" source_line=42` into the metadata instead.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator

from ..._core.source import Frame, Source, choose_source
from ._hlo import Computation, Instruction, Module
from ._neighbours import also_in_fusions, consumers, nearest, producers

_ENTRY = re.compile(r"^(\d+) (?:\"((?:[^\"\\]|\\.)*)\"|\{([^}]*)\})\s*$")
_FIELD = re.compile(r"(\w+)=(\d+)")
_FRAME_ID = re.compile(r"stack_frame_id=(\d+)")
_OLD_FORM = re.compile(r'source_file="((?:[^"\\]|\\.)*)" source_line=(\d+)')
_OWN_PATH = re.compile(r'op_name="((?:[^"\\]|\\.)*)"([^}\n]*?stack_frame_id=(\d+))')
_PATH = "jit("
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_DEEPEST = 1000


def restore_paths(hlo: str) -> str:
    """The text of a program with whole paths where it was traced without stacks; else the same."""
    sources = Sources(hlo)
    if not sources.lack_stacks:
        return hlo
    return _OWN_PATH.sub(lambda match: sources.with_path(match), hlo)


def place_of(instruction: Instruction) -> str:
    """Where an instruction's metadata says that it comes from, as text; "" if it does not."""
    named = "metadata=" in instruction.rest
    return place_in(instruction.attrs.get("metadata", "")) if named else ""


def place_in(metadata: str) -> str:
    """The same of a text with one instruction's metadata."""
    match = _FRAME_ID.search(metadata) or _OLD_FORM.search(metadata)
    return match[0] if match else ""


def result_names(instruction: Instruction, operand: str, here: Computation) -> list[str]:
    """Names of the instructions whose result is what one operand becomes; through a `-done`."""
    if len(instruction.operands) == 1:
        return [instruction.name]
    readers = [here.instructions[name] for name in here.users.get(instruction.name, ())]
    done = [one for one in readers if one.opcode.endswith("-done")]
    readers += [here.instructions[n] for one in done for n in here.users.get(one.name, ())]
    index = str(instruction.operands.index(operand))
    elements = [one for one in readers if one.opcode == "get-tuple-element"]
    return [one.name for one in elements if one.attrs["index"].strip() == index]


class Sources:
    """The sources of one program's instructions; unknown where its text has no tables."""

    def __init__(self, hlo: str, module: Module | None = None) -> None:
        """Reads the tables at the start of `compiled.as_text()`, which `module` is parsed from."""
        self._module = module or Module("", {}, "")
        self._at: dict[str, Source | None] = {}
        self._tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
        table: dict[int, str] | None = None
        for line in _lines_before_computations(hlo):
            if line.rstrip() in self._tables:
                table = self._tables[line.rstrip()]
            elif table is not None and (entry := _ENTRY.match(line)):
                table[int(entry[1])] = entry[2] if entry[2] is not None else entry[3]
        # The outermost frame has no parent. Compilers print that as 0, or count parents from 1.
        first = dict(_FIELD.findall(self._tables["StackFrames"].get(1, "")))
        self._no_parent = int(first.get("parent_frame_id", 0))

    @property
    def lack_stacks(self) -> bool:
        """Whether functions are the paths of JAX scopes: the program was traced without stacks."""
        return any(name.startswith(_PATH) for name in self._tables["FunctionNames"].values())

    def with_path(self, match: "re.Match[str]") -> str:
        """The path of an instruction, with that of its frame before it."""
        frame = next(self._stack(int(match[3])), None)
        path = f"{frame.function}/" if frame and frame.function.startswith(_PATH) else ""
        return f'op_name="{path}{match[1]}"{match[2]}'

    def of(self, instruction: Instruction, here: Computation) -> Source | None:
        """The source of an instruction; without metadata, that of its nearest neighbours.

        A neighbour whose frames are all of libraries ends the search: what an optimizer computes
        has no source, not that of the loss.
        """
        place = self._place_of(instruction)
        for onward in (producers(here), consumers(here)):
            found = () if place else nearest(onward(instruction), onward, self._place_of, here)
            place = found[0] if found else place
        return self.at(place or "")

    def of_operands(self, instruction: Instruction, here: Computation) -> tuple[Source | None, ...]:
        """The source of each array that an instruction sends.

        A collective that the compiler combined has the metadata of one of its parts. Each part's
        own is on the element that is taken out of its result:

            %ar = (f32[8], f32[4]) all-reduce(%a, %b), metadata={… stack_frame_id=7}
            %x = f32[8] get-tuple-element(%ar), index=0, metadata={… stack_frame_id=7}
            %y = f32[4] get-tuple-element(%ar), index=1, metadata={… stack_frame_id=9}
        """
        if len(instruction.operands) == 1:
            return (self.of(instruction, here),)
        sources = []
        for name in instruction.operands:
            part = next(iter(result_names(instruction, name, here)), name)
            sources.append(self.of(here.instructions.get(part, instruction), here))
        return tuple(sources)

    @functools.cached_property
    def _place_of(self) -> Callable[[Instruction], str | None]:
        return also_in_fusions(place_of, self._module)

    def at(self, place: str) -> Source | None:
        """The source at what `place_of` returned."""
        if place and place not in self._at:
            old = _OLD_FORM.match(place)
            frames = (
                [Frame(old[1], int(old[2]), "?")]
                if old
                else self._stack(int(place.partition("=")[2]))
            )
            known = (
                dataclasses.replace(one, function="?") if one.function.startswith(_PATH) else one
                for one in frames
            )
            self._at[place] = choose_source(known)
        return self._at.get(place)

    def _stack(self, number: int) -> Iterator[Frame]:
        """The frames of a stack, the innermost first."""
        names, functions, locations, frames = self._tables.values()
        for _ in range(_DEEPEST):
            fields = dict(_FIELD.findall(frames.get(number, "")))
            place = dict(_FIELD.findall(locations.get(int(fields.get("file_location_id", 0)), "")))
            if not place:
                return
            yield Frame(
                names.get(int(place["file_name_id"]), "?"),
                int(place["line"]),
                functions.get(int(place.get("function_name_id", 0)), "?"),
            )
            number = int(fields.get("parent_frame_id", 0)) - self._no_parent


def _lines_before_computations(hlo: str) -> Iterator[str]:
    start = 0
    while start < len(hlo):
        end = hlo.find("\n", start)
        end = len(hlo) if end < 0 else end
        line = hlo[start:end]
        if line.startswith(("%", "ENTRY")):
            return
        yield line
        start = end + 1
