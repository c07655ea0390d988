"""Pulse samples as OpenQASM 3 with OpenPulse: one ``cal`` block with a port, a frame and a waveform a channel.

A waveform is an array of complex samples in units of full scale, which a frame shifts to its carrier,
exp(i(2π f t + θ)), and a port plays at its own sample clock. The language has no place for that clock, nor for what
full scale is: they stand in annotations of the block, which compilers that do not know them ignore. A barrier and one
delay start all channels together. Ports are declared as ``port``: the specification writes ``extern port``, which its
reference parser does not accept; arrays stand in braces, as in that parser's grammar.

References:
    OpenQASM 3 specification, openqasm/openqasm, source/language/openpulse.rst (ports, frames, waveforms, timing) and
    directives.rst (annotations); reference grammar in the Python packages openqasm3 and openpulse 1.0.
"""

import cmath
import contextlib
import io
import json
import math
import re
from typing import Any

import numpy as np

from experiments.waveform_samples import Samples, WaveformError

_OURS = "iontwin."
_KEYS = ("sample_s", "full_scale_rad_s", "carrier_hz", "bits", "attributes")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


def to_openqasm(samples: Samples) -> bytes:
    """OpenQASM 3 that plays the samples; numbers keep every digit.

    Raises:
        WaveformError: a sample beyond full scale, or a start before the trigger.
    """
    if samples.start_s < 0:
        raise WaveformError(f"start_s is {samples.start_s:g}, but no delay is negative; start at 0 or later.")
    values = samples.scaled()
    frames = ", ".join(f"{channel}_frame" for channel in samples.channels)
    carriers = samples.carrier_hz or (0.0,) * len(samples.channels)
    lines = ["OPENQASM 3.0;", 'defcalgrammar "openpulse";', ""]
    lines += [f"@{_OURS}{key} {json.dumps(getattr(samples, key))}" for key in _KEYS]
    lines.append("cal {")
    for channel, carrier in zip(samples.channels, carriers, strict=True):
        lines.append(f"  port {channel}_port;")
        lines.append(f"  frame {channel}_frame = newframe({channel}_port, {carrier!r}, 0.0);")
    for channel, wave in zip(samples.channels, values.T, strict=True):
        lines.append(f"  waveform {channel}_waveform = {{")
        lines.append(",\n".join(f"    {_written(complex(value))}" for value in wave))
        lines.append("  };")
    lines.append(f"  barrier {frames};")
    if samples.start_s:
        lines.append(f"  delay[{samples.start_s!r}s] {frames};")
    lines += [f"  play({channel}_frame, {channel}_waveform);" for channel in samples.channels]
    return ("\n".join([*lines, "}"]) + "\n").encode()


def from_openqasm(data: bytes) -> Samples:
    """The samples of such a program, taken from its syntax tree; the phase of a frame turns its samples.

    Raises:
        WaveformError: openpulse is missing, the text does not parse, or it is more than one waveform a frame.
    """
    cal, statements = _parsed(data)
    metadata, block = _metadata(cal), _Block()
    for statement in statements:
        block.run(statement)
    if not block.played or len({len(wave) for wave in block.played.values()}) > 1:
        counts = ", ".join(f"{frame} {len(wave)}" for frame, wave in block.played.items()) or "nothing"
        raise WaveformError(f"the cal block plays {counts}; play one waveform a frame, all of one length.")
    starts = {block.start_s[frame] for frame in block.played}
    if len(starts) > 1:
        raise WaveformError(f"the frames start at {sorted(starts)} s; start them together, after one barrier.")
    channels = tuple(frame.removesuffix("_frame") for frame in block.played)
    values = np.stack(list(block.played.values()), axis=1)
    if metadata.setdefault("carrier_hz", ()) is not None:
        metadata["carrier_hz"] = [block.frames[frame][0] for frame in block.played]
    relative = Samples(
        real_rad_s=values.real, imag_rad_s=values.imag, start_s=starts.pop(), channels=channels, **metadata
    )
    return relative.amplified(np.array(relative.full_scale_rad_s))


class _Block:
    """What the statements of a cal block have declared and played so far.

    Attributes:
        frames: carrier (Hz) and phase factor of each frame. clock_s: its time.
        played: samples of each frame in units of full scale, shape (samples,). start_s: when they began.
    """

    def __init__(self):
        self.frames: dict[str, tuple[float, complex]] = {}
        self.waveforms: dict[str, np.ndarray] = {}
        self.clock_s: dict[str, float] = {}
        self.played: dict[str, np.ndarray] = {}
        self.start_s: dict[str, float] = {}

    def run(self, statement: Any) -> None:
        kind, line = type(statement).__name__, statement.span.start_line
        declared = type(statement.type).__name__ if kind == "ClassicalDeclaration" else ""
        if declared == "PortType":
            return
        if declared == "FrameType":
            call = _call(statement.init_expression, "newframe", 3, line)
            name = statement.identifier.name
            self.frames[name] = (_value(call[1], line).real, cmath.exp(1j * _value(call[2], line).real))
            self.clock_s[name] = 0.0
        elif declared == "WaveformType":
            array = statement.init_expression
            if type(array).__name__ != "ArrayLiteral":
                raise _refused(line, "defines a waveform by a template; write its samples, {0.5+0.0im, ...}")
            self.waveforms[statement.identifier.name] = np.array([_value(item, line) for item in array.values])
        elif kind == "QuantumBarrier":
            names = self._frames(statement.qubits, line)
            self.clock_s |= dict.fromkeys(names, max(self.clock_s[name] for name in names))
        elif kind == "DelayInstruction":
            for name in self._frames(statement.qubits, line):
                self.clock_s[name] += _value(statement.duration, line).real
        elif kind == "ExpressionStatement":
            frame, wave = (getattr(item, "name", None) for item in _call(statement.expression, "play", 2, line))
            if frame not in self.frames or wave not in self.waveforms or frame in self.played:
                raise _refused(line, f"plays {wave} on {frame}; play a waveform of the block, once on each frame")
            self.played[frame] = self.waveforms[wave] * self.frames[frame][1]
            self.start_s[frame] = self.clock_s[frame]
        else:
            raise _refused(line, f"is a {kind}; keep to ports, frames, waveforms, barrier, delay and play")

    def _frames(self, items: list, line: int) -> list[str]:
        names = [getattr(item, "name", "") for item in items]
        if not names or any(name not in self.frames for name in names):
            raise _refused(line, f"names {', '.join(map(str, names)) or 'nothing'}; name frames of the block")
        return names


def _written(value: complex) -> str:
    sign = "-" if math.copysign(1.0, value.imag) < 0 else "+"
    return f"{value.real!r} {sign} {abs(value.imag)!r}im"


def _parsed(data: bytes) -> tuple[Any, list]:
    """The one cal block of a program, and its statements."""
    try:
        import openqasm3
        from openpulse.parser import OpenPulseParsingError, parse_openpulse
        from openqasm3.parser import QASM3ParsingError
    except ImportError:
        raise WaveformError("reading OpenQASM needs the package openpulse; run pip install openpulse.") from None
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the lexer prints there what the exception says anyway
            program = openqasm3.parse(data.decode("utf-8"))
            blocks: list[Any] = [item for item in program.statements if type(item).__name__ == "CalibrationStatement"]
            if len(blocks) != 1:
                raise WaveformError(f"the program has {len(blocks)} cal blocks, but needs one that plays the samples.")
            statements: list[Any] = parse_openpulse(blocks[0].body, in_defcal=False, permissive=False).body
    except (OpenPulseParsingError, QASM3ParsingError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split()) or "syntax error"
        raise WaveformError(f"this is not OpenQASM 3 with OpenPulse ({reason:.120}); write it again.") from None
    # The parser of the block ends without a word at what is no statement.
    lines, rest = blocks[0].body.splitlines(), blocks[0].body
    if statements:
        span = statements[-1].span
        rest = "\n".join([lines[span.end_line - 1][span.end_column + 1 :], *lines[span.end_line :]])
    if left := _COMMENT.sub("", rest).strip():
        raise WaveformError(f"the cal block holds {left!r:.60}, which is no statement of OpenPulse; remove it.")
    return blocks[0], statements


def _metadata(block: Any) -> dict[str, Any]:
    metadata = {}
    for annotation in block.annotations:
        key = annotation.keyword.removeprefix(_OURS)
        if annotation.keyword.startswith(_OURS) and key in _KEYS:
            try:
                metadata[key] = json.loads(annotation.command)
            except (TypeError, ValueError):
                raise WaveformError(f"@{_OURS}{key} is {annotation.command!r:.60}, which is not JSON.") from None
    for key in ("sample_s", "full_scale_rad_s"):
        if key not in metadata:
            raise WaveformError(
                f"the cal block lacks the annotation @{_OURS}{key}, which OpenPulse cannot say; add it."
            )
    return metadata


def _call(expression: Any, name: str, count: int, line: int) -> list:
    called = getattr(getattr(expression, "name", None), "name", None)
    if type(expression).__name__ != "FunctionCall" or called != name or len(expression.arguments) != count:
        raise _refused(line, f"does not call {name} with {count} arguments; write it so")
    return expression.arguments


def _value(node: Any, line: int) -> complex:
    """Number of a literal expression, durations in seconds."""
    kind = type(node).__name__
    if kind in ("FloatLiteral", "IntegerLiteral"):
        return complex(node.value)
    if kind == "ImaginaryLiteral":
        return complex(0.0, node.value)
    if kind == "DurationLiteral" and node.unit.name in (units := {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}):
        return complex(node.value / units[node.unit.name])
    if kind == "UnaryExpression" and node.op.name == "-":
        return -_value(node.expression, line)
    if kind == "BinaryExpression" and node.op.name in "+-":
        left, right = _value(node.lhs, line), _value(node.rhs, line)
        return left + right if node.op.name == "+" else left - right
    raise _refused(line, f"holds a {kind} where a number is needed; write it as a literal")


def _refused(line: int, reason: str) -> WaveformError:
    return WaveformError(f"line {line} of the cal block {reason}.")
