"""How the text of a PTX module is read: parameters, registers, instructions and labels of its one kernel."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)(?:\s+\.ptr\s+\.\w+\s+\.align\s+\d+)?\s+([\w$]+)")


@dataclass(frozen=True)
class Instruction:
    """One instruction: `@predicate name.part.kind operands`."""

    predicate: str  # the register, with ! before it if negated; "" if there is none
    parts: tuple[str, ...]  # of the name, at the points
    operands: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The type that is named last."""
        return self.parts[-1]


@dataclass
class Program:
    """A kernel as it was read."""

    parameters: list[tuple[str, str]] = field(default_factory=list)  # type and name
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # index of the instruction behind the label
    registers: dict[str, str] = field(default_factory=dict)  # type by name, or by prefix: `%r` for %r0, %r1, ..

    def register_kind(self, name: str) -> str:
        """The type with which a register is declared."""
        return self.registers.get(name) or self.registers[name.rstrip("0123456789")]


def read(text: str) -> Program:
    """Read a module with one kernel."""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"(?m)^\s*\.(loc|file)\b[^\n]*$", "", text)
    entry = text[text.index(".entry") :]
    head, _, rest = entry.partition("{")
    made = Program(parameters=_PARAMETER.findall(head))
    for raw in re.split(r"(?<=;)|(?<=:)(?=\s)", rest[: rest.rindex("}")]):
        statement = raw.strip()
        while statement[:1] in ("{", "}") and statement:
            statement = statement[1:].strip()
        if re.fullmatch(r"[\w$.]+:", statement):
            made.labels[statement[:-1]] = len(made.code)
            continue
        statement = statement.rstrip(";").strip()
        if statement.startswith(".reg"):
            _declare(made, statement)
        elif statement and not statement.startswith("."):
            made.code.append(_instruction(statement))
    return made


def _declare(made: Program, statement: str) -> None:
    found = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement)
    assert found is not None
    for name in found[2].split(","):
        made.registers[re.sub(r"<\d+>$", "", name.strip())] = found[1]


def _instruction(statement: str) -> Instruction:
    predicate = ""
    if statement.startswith("@"):
        predicate, statement = statement[1:].split(None, 1)
    name, *rest = statement.split(None, 1)
    return Instruction(predicate, tuple(name.split(".")), tuple(_operands(rest[0] if rest else "")))


def _operands(text: str) -> list[str]:
    """Separated by commas, of which those in brackets or braces do not count."""
    return [part.strip() for part in re.split(r",(?![^\[{]*[\]}])", text) if part.strip()]
