"""Give `jaxmorph.train` thousands of damaged, odd and hostile settings files, schedules and curves.

    python benchmarks/fuzz_input.py --cases 12000 --json fuzz_input.json

The generated ones are real settings and schedules, of `configs/` or drawn from the tables of settings
and operations, with some mutations each: of their values, names and structure; of their notation as
YAML or JSON (tags, anchors, several documents, nesting, repeated keys); of their bytes (encodings,
byte-order marks, line ends, control characters, truncation, noise). Then come the written ones of
`tests/odd_inputs.py`, each with what it must say.

Every case is a dry run in this process. It must end as accepted (status 0) or refused (status 2, one
line that names the file or a flag), leave the file as it was, print no control character but newlines
and tabs, and answer within --limit seconds of this process's time (others may use the machine).
The cases depend on --seed alone; failures are printed and kept with their files under --keep.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from jaxmorph.config.fields import Field, fields_of
from jaxmorph.config.settings import Settings
from jaxmorph.growth.operations import OPERATIONS
from jaxmorph.train import main as train

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
import odd_inputs  # noqa: E402 -- the table that the tests use too

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST = 6000  # characters of a refusal
HANGS = 30  # seconds of wall time after which a case is broken off
ODD_TEXT = (
    *("", " ", "\n", "\x00", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\r", "\u202etxt", "\ufeff"),
    *(
        "\ud800",
        "\udcff",
        "é",
        "訓練",
        "👩‍👩‍👧",
        "x" * 300,
        "x" * 70_000,
        "~",
        "~nosuchuser",
        "../..",
        "/",
    ),
    *(
        "/dev/zero",
        "/dev/null",
        "null",
        "yes",
        "on",
        "0x10",
        "1_000",
        "١٢",
        "²",
        "{}",
        "[]",
        "*",
        "&a",
    ),
    *(
        "!!bool maybe",
        "- -",
        "? :",
        "%s",
        "${HOME}",
        "<script>",
        "'",
        '"',
        "\\",
        "a: b",
        "#",
        "NaN",
    ),
)
ODD_NUMBERS = (
    *(0, -0.0, 1, -1, 0.1, 0.5, 2, 3, 7, 64, 1e-3, 1e-8, 1e-30, 1e-39, 1e-46, 1e-300, 5e-324, 1e30),
    *(1e39, 1e308, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**30, 10**399, 10**400),
    *(float("inf"), float("-inf"), float("nan"), 0.9999999999, 1.0000000001, 1 - 2**-53),
)
NUMERALS = (
    *("1e-999", "-1e-999", "1e999", "0e999999999", "1" * 401, "9" * 5000, "0." + "0" * 9000 + "1"),
    *(
        "+1",
        "01",
        "0o7",
        "0b1",
        "1e",
        ".",
        "1.",
        ".5",
        "-",
        "1__0",
        "0x1p-3",
        "1,000",
        "١",
        "1e+3",
        "~",
    ),
    *(".inf", "-.INF", ".nan", "Infinity", "-Infinity", "NaN", "12:30", "2001-01-01", "1e-45"),
)
CONTROLS = (b"\x00", b"\x1b[2J", b"\x07", b"\xc2\x9b", b"\x7f", b"\xe2\x80\xae")
TAGS = (
    *(
        "!!bool",
        "!!int",
        "!!float",
        "!!null",
        "!!timestamp",
        "!!binary",
        "!!set",
        "!!omap",
        "!!str",
    ),
    *("!!python/name:os.system", "!x", "!", "!<tag:x>", "!!map", "!!seq", "!!merge", "!!value"),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """An input: the kind of mutations it had, the command line, and its file with the content."""

    kind: str
    argv: list[str]
    path: Path | None
    said: str | None = None  # what the refusal must say; "" for anything
    must_fail: bool | None = None  # None: either is right


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a case: a class, the seconds it took, and what is wrong ("" for nothing)."""

    name: Literal["accepted", "refused", "failed"]
    seconds: float
    problem: str = ""


# ---------------------------------------------------------------- generation


class Generator:
    """Draw settings, schedules and curves, and damage them."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.fields = dict(fields_of(Settings))
        self.configs = [_plain(path) for path in sorted((ROOT / "configs").glob("*.yaml"))]
        schedules = sorted((ROOT / "configs" / "schedules").iterdir())
        self.schedules = [yaml.safe_load(path.read_text()) for path in schedules]

    def case(self, folder: Path) -> Case:
        """Return the next case, its file written."""
        kind, content, suffix, others = self.random.choices(
            (self.config, self.schedule, self.curve), (5, 6, 1)
        )[0]()
        text, how = self.text_of(content, suffix)
        data, how_bytes = self.bytes_of(text)
        path = folder / f"{kind}{suffix}"
        path.write_bytes(data)
        flag = {"settings": "--config", "schedule": "--scaling_schedule_file"}
        argv = [flag.get(kind, "--simulate_loss"), str(path), *others]
        return Case(f"{kind}: {how_bytes or how}", argv, path)

    def config(self) -> tuple[str, Any, str, list[str]]:
        """Settings: a file's, or some drawn from the table."""
        draw = self.random
        if draw.random() < 0.4:
            content = dict(draw.choice(self.configs))
        else:
            names = draw.sample(list(self.fields), draw.randint(0, 8))
            content = {name: self.setting(self.fields[name]) for name in names}
        for name in ("dry_run", "run_dir", "cache_dir", "simulate_loss", "scaling_schedule_file"):
            content.pop(name, None)
        return "settings", self.mutated(content), draw.choice((".yaml", ".json")), []

    def schedule(self) -> tuple[str, Any, str, list[str]]:
        """A schedule: a file's, or entries drawn from the table of operations."""
        draw = self.random
        content = [dict(entry) for entry in draw.choice(self.schedules)]
        if draw.random() < 0.6:
            content = [self.entry() for _ in range(draw.choice((0, 1, 1, 2, 3, 8, 40)))]
        start = [["--max_steps", "5000", "--attn_lora_rank_divisor", "8"], ["--n_layers", "2"], []]
        return (
            "schedule",
            self.mutated(content),
            draw.choice((".yaml", ".json")),
            draw.choice(start),
        )

    def curve(self) -> tuple[str, Any, str, list[str]]:
        """A loss curve: lines of numbers, some of them odd."""
        draw, step, lines = self.random, 0, ["step,loss"]
        for _ in range(draw.choice((0, 1, 5, 100))):
            step += draw.randint(1, 400)
            lines.append(f"{step},{draw.uniform(0, 11)}")
        for _ in range(draw.randint(0, 2)):
            cells = [str(self.odd()) for _ in range(draw.randint(0, 3))]
            lines.insert(draw.randint(0, len(lines)), ",".join(cells))
        schedule = ROOT / "configs" / "schedules" / "growth.yaml"
        return "curve", "\n".join(lines), ".csv", ["--scaling_schedule_file", str(schedule)]

    def setting(self, field: Field) -> Any:
        """A value of a setting's type, mostly in its range."""
        draw, kind = self.random, self.random.choice(field.types)
        if typing.get_origin(kind) is Literal:
            return draw.choice(typing.get_args(kind))
        if kind is bool:
            return draw.random() < 0.5
        if kind is int:
            return draw.choice((1, 2, 6, 12, 384, 768, draw.randint(0, 3000)))
        if kind is float:
            return draw.choice((0.1, 0.5, 1.0, 2.0, 1e-3, 10 ** draw.uniform(-8, 3)))
        return None if kind is type(None) else draw.choice(("stdlib", "byte", ""))

    def entry(self) -> dict[str, Any]:
        """An entry of a schedule, mostly one that can be applied."""
        draw = self.random
        operation = OPERATIONS[draw.choice(list(OPERATIONS))]
        numbers = {int: (1, 2, 8, 64, 100), float: (2, 2.0, 1.5, 3, 0.5, 1)}
        value = None if operation.value.kind is None else draw.choice(numbers[operation.value.kind])
        found: dict[str, Any] = {"name": operation.name, "value": value}
        found["reevaluate"] = draw.random() < 0.5
        found["max_wait_iters"] = draw.choice((1, 100, 2000, 2000, None))
        found["trigger_loss"] = draw.choice((None, 1.5, 3.0, 5))
        if draw.random() < 0.3:
            found["trigger_plateau"] = draw.randint(1, 5)
        if draw.random() < 0.2:
            found["desc"] = draw.choice(ODD_TEXT)
        if operation.options and draw.random() < 0.4:
            name = draw.choice(list(operation.options))
            option = operation.options[name]
            found["options"] = {name: draw.choice(option.choices or (option.default,))}
        return found

    def odd(self) -> Any:
        """A value that fits nowhere."""
        draw = self.random
        made: Sequence[Callable[[], Any]] = (
            lambda: draw.choice(ODD_NUMBERS),
            lambda: draw.choice(ODD_TEXT),
            lambda: "".join(chr(draw.randrange(draw.choice((256, 0xD7FF)))) for _ in range(9)),
            lambda: odd_inputs.nested(draw.choice((1, 3, 20, 60))),
            lambda: {draw.choice(ODD_TEXT): draw.choice(ODD_NUMBERS)},
            lambda: draw.choice((True, False, None, [], {})),
            lambda: draw.uniform(-1, 1) * 10 ** draw.uniform(-320, 300),
        )  # fmt: skip
        return draw.choice(made)()

    def mutated(self, content: Any) -> Any:
        """Change values, names and structure in some places."""
        draw = self.random
        for _ in range(draw.choices((0, 1, 2, 5), (7, 4, 2, 1))[0]):
            places = list(_places(content))
            if not places:
                return self.odd()
            parent, key = draw.choice(places)
            what = draw.randrange(6)
            if what < 3:
                parent[key] = self.odd()
            elif what == 3 and isinstance(parent, dict):
                parent[draw.choice((str(key)[:-1], str(key).upper(), *ODD_TEXT))] = parent.pop(key)
            elif what == 4:
                parent[key] = draw.choice(([parent[key]], {"a": parent[key]}, str(parent[key])))
            else:
                del parent[key]
        if draw.random() < 0.03:
            return draw.choice((self.odd(), [content], {"a": content}, content and [content] * 700))
        return content

    # ------------------------------------------------------------ notation

    def text_of(self, content: Any, suffix: str) -> tuple[str, str]:
        """Write the content as YAML or JSON, and change the notation."""
        draw = self.random
        if suffix == ".csv":
            return content, "values"
        if suffix == ".json":
            text = json.dumps(
                content, indent=draw.choice((None, 1)), ensure_ascii=draw.random() < 0.5
            )
        else:
            flow = draw.choice((None, True, False))
            unicode = draw.random() < 0.5
            text = yaml.safe_dump(
                content, sort_keys=False, default_flow_style=flow, allow_unicode=unicode
            )
        if draw.random() < 0.65:
            return text, "values"
        lines = text.split("\n")
        at = draw.randrange(len(lines))
        changes: dict[str, Callable[[], str]] = {
            "tag": lambda: re.sub(r": ", f": {draw.choice(TAGS)} ", lines[at], count=1),
            "anchor": lambda: re.sub(r": ", ": &a ", lines[at], count=1),
            "alias": lambda: re.sub(r": .*", ": *a", lines[at], count=1),
            "numeral": lambda: re.sub(r": .*?(,?)$", rf": {draw.choice(NUMERALS)}\1", lines[at]),
            "repeated line": lambda: f"{lines[at]}\n{lines[at]}",
            "document": lambda: f"{lines[at]}\n{draw.choice(('---', '...', '--- x', '%YAML 1.1'))}",
            "indentation": lambda: draw.choice((" ", "\t", "    ")) + lines[at],
            "bracket": lambda: lines[at] + draw.choice("[]{}:,-?&*!|>'\"%@`"),
            "nesting": lambda: lines[at] + draw.choice("[{") * draw.choice((1, 50, 3000)),
            "merge": lambda: f"<<: {{a: 1}}\n{lines[at]}",
        }
        how = draw.choice(list(changes))
        lines[at] = changes[how]()
        return "\n".join(lines), how

    def bytes_of(self, text: str) -> tuple[bytes, str]:
        """Encode the text, and change the bytes."""
        draw, data = self.random, text.encode("utf-8", "surrogatepass")
        if draw.random() < 0.75:
            return data, ""
        at, to = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        noise = bytes(draw.randrange(256) for _ in range(draw.choice((1, 3, 200))))
        changes: dict[str, Callable[[], bytes]] = {
            "byte-order mark": lambda: b"\xef\xbb\xbf" + data,
            "UTF-16": lambda: text.encode("utf-16", "surrogatepass"),
            "Latin-1": lambda: text.encode("latin-1", "replace") + b" \xe9",
            "CRLF": lambda: data.replace(b"\n", b"\r\n"),
            "CR": lambda: data.replace(b"\n", b"\r"),
            "cut": lambda: data[:at],
            "slice lost": lambda: data[:at] + data[to:],
            "slice twice": lambda: data[:to] + data[at:],
            "noise": lambda: data[:at] + noise + data[at:],
            "bit flipped": lambda: _flipped(data, draw),
            "control": lambda: data[:at] + draw.choice(CONTROLS) + data[at:],
            "binary": lambda: draw.randbytes(draw.choice((0, 1, 100, 5000))),
            "repeated": lambda: data * draw.choice((2, 30)),
        }  # fmt: skip
        how = draw.choice(list(changes))
        return changes[how](), how


def _flipped(data: bytes, draw: random.Random) -> bytes:
    """The bytes with one bit changed."""
    changed = bytearray(data)
    if changed:
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _plain(path: Path) -> dict[str, Any]:
    """The settings of a file, with data that is there."""
    return yaml.safe_load(path.read_text()) | {"data": "stdlib"}


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of every value."""
    keys = range(len(content)) if isinstance(content, list) else list(content)
    for key in keys if isinstance(content, (list, dict)) else ():
        yield content, key
        if isinstance(content[key], (list, dict)):
            yield from _places(content[key])


# ------------------------------------------------------------------- judgement


def outcome(case: Case, limit: float) -> Outcome:
    """Run a case and judge how it ended."""
    before = case.path.read_bytes() if case.path else b""
    out, err = io.StringIO(), io.StringIO()
    signal.alarm(HANGS)
    start = time.process_time()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = train([*case.argv, "--dry_run"])
    except BaseException:
        return Outcome("failed", time.process_time() - start, traceback.format_exc())
    finally:
        signal.alarm(0)
    seconds = time.process_time() - start
    problem = _problem(case, status, out.getvalue(), err.getvalue())
    if not problem and seconds > limit:
        problem = f"took {seconds:.1f} s"
    if not problem and case.path and case.path.read_bytes() != before:
        problem = "the file was changed"
    name = "accepted" if status == 0 else "refused"
    return Outcome("failed" if problem else name, seconds, problem)


def _problem(case: Case, status: int, out: str, err: str) -> str:
    """Return what is wrong with how a case ended."""
    if found := CONTROL.search(out + err):
        return f"printed {found[0]!r}"
    if status not in (0, 2):
        return f"status {status}"
    if case.must_fail is not None and case.must_fail != (status == 2):
        return f"status {status}"
    if status == 0:
        return "" if not err else f"accepted with {err!r}"
    if out or not err.startswith("error: ") or err.count("\n") != 1:
        return f"not one line: {err[:200]!r}, {out[:200]!r}"
    if len(err) > LONGEST:
        return f"{len(err)} characters"
    place = err.removeprefix("error: ")
    if case.path and str(case.path.parent) not in err and not place.startswith("--"):
        return f"names neither file nor flag: {err[:200]!r}"
    return (
        "" if (case.said or "").lower() in err.lower() else f"does not say {case.said!r}: {err!r}"
    )


def written(folder: Path) -> Iterator[Case]:
    """Yield the written cases."""
    for argv, said, path in odd_inputs.rows(folder):
        yield Case("written", argv, path, said or "", said is not None)


def generated(seed: int, count: int, folder: Path) -> Iterator[Case]:
    """Yield the generated cases, each in place of the one before."""
    generator = Generator(seed)
    for _ in range(count):
        yield generator.case(folder)


def _interrupt(*_: object) -> None:
    raise TimeoutError(f"no answer in {HANGS} s")


def run(cases: Iterator[Case], limit: float, keep: Path | None) -> dict[str, Any]:
    """Run cases; print the failures, and return counts of outcomes by kind and the times."""
    counts: dict[str, Counter[str]] = {}
    seconds: list[float] = []
    for number, case in enumerate(cases):
        found = outcome(case, limit)
        counts.setdefault(case.kind, Counter())[found.name] += 1
        seconds.append(found.seconds)
        if found.problem:
            print(f"case {number}, {case.kind}: {case.argv!a}\n{found.problem}", flush=True)
            if keep and case.path:
                keep.mkdir(parents=True, exist_ok=True)
                shutil.copy(case.path, keep / f"{number}{case.path.suffix}")
        if number % 1000 == 999:
            print(f"{number + 1:,} cases", file=sys.stderr, flush=True)
    return {
        "cases": len(seconds),
        "outcomes": dict(sum(counts.values(), Counter())),
        "by_kind": {kind: dict(count) for kind, count in sorted(counts.items())},
        "median_seconds": statistics.median(seconds) if seconds else 0.0,
        "longest_seconds": max(seconds, default=0.0),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = ["| inputs | cases | accepted | refused in one line | failed | median | longest |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, result in results.items():
        kinds: dict[str, Counter[str]] = {name: Counter(result["outcomes"])}
        for kind, count in result["by_kind"].items():
            if kind != name:
                kinds.setdefault(f"– {kind}", Counter()).update(count)
        for kind, count in kinds.items():
            times = f"{result['median_seconds']:.3f} s | {result['longest_seconds']:.2f} s"
            numbers = [sum(count.values()), count["accepted"], count["refused"], count["failed"]]
            row = " | ".join(f"{number:,}" for number in numbers)
            lines.append(f"| {kind} | {row} | {times if kind == name else '|'} |")
    return "\n".join(lines)


def main() -> int:
    """Run all cases and return 1 if any failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=12_000, help="generated cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=2.0, help="longest answer, in seconds")
    parser.add_argument("--keep", type=Path, help="folder for the files of failures")
    parser.add_argument("--json", type=Path, help="where to write the results")
    arguments = parser.parse_args()
    signal.signal(signal.SIGALRM, _interrupt)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        odd_inputs.make_places(folder)
        os.chdir(folder)
        keep = arguments.keep
        cases = generated(arguments.seed, arguments.cases, folder)
        results = {"generated": run(cases, arguments.limit, keep)}
        results["written"] = run(written(folder), arguments.limit, keep)
    facts = {"python": platform.python_version(), "seed": arguments.seed, "limit": arguments.limit}
    if arguments.json:
        arguments.json.write_text(json.dumps(facts | results, indent=1) + "\n")
    print(table(results))
    return int(any(result["outcomes"].get("failed") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
