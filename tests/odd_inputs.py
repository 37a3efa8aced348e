"""Two hundred inputs that somebody with bad intent, or bad luck, could give: each with what is said.

`CONFIGS` are settings files, `SCHEDULES` scaling schedules, `CURVES` loss curves and `FLAGS` command
lines; all of them for a dry run. A row is (content or words, what the message must say); None for an
input that must be accepted. `{tmp}` stands for the folder in which `make_places` has made its files.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Content = str | bytes
DIGITS = "1" * 400
ENTRY: Mapping[str, Any] = {
    "name": "change_lr",
    "value": 0.5,
    "trigger_loss": 3.0,
    "max_wait_iters": 100,
    "reevaluate": False,
}


def nested(depth: int, inner: Any = 1) -> Any:
    """A list in a list in a list ..."""
    for _ in range(depth):
        inner = [inner]
    return inner


CONFIGS: Sequence[tuple[Content, str | None]] = [
    # documents of another kind
    ("", None),
    ("# nothing but a comment\n", None),
    ("---\n", None),
    ("null", None),
    ("{}", None),
    ("[]", "list"),
    ("42", "int"),
    ("true", "bool"),
    ("just words", "str"),
    ('{"n_layers": 2, "biases": false}', None),
    ("n_layers: 2\n---\nn_layers: 3\n", "another document"),
    ("---\nn_layers: 2\n...\n", None),
    ("%YAML 1.1\n---\nn_layers: 2\n", None),
    ("%YAML 9.9\n---\nn_layers: 2\n", "incompatible YAML"),
    (f"%YAML 1.{'9' * 5000}\n---\nn_layers: 2\n", "valid YAML"),
    ("%TAG ! tag:example.org,2000:\n---\nn_layers: !x 2\n", "a tag"),
    ("%NONSENSE x\n---\nn_layers: 2\n", None),
    # tags, anchors, aliases, merges
    ("biases: !!bool maybe", "a tag (!!bool)"),
    ("seed: !!int one", "a tag (!!int)"),
    ("seed: !!int 3", "a tag (!!int)"),
    ('learning_rate: !!float ""', "a tag (!!float)"),
    ("run_dir: !!timestamp 2001-99-99", "a tag (!!timestamp)"),
    ("run_dir: !!binary 4pyT", "a tag (!!binary)"),
    ("run_dir: !!str 4", "a tag (!!str)"),
    ("run_dir: !!null x", "a tag (!!null)"),
    ("!!map {n_layers: 2}", "a tag (!!map)"),
    ("!!set {n_layers}", "a tag (!!set)"),
    ("!!omap [n_layers: 2]", "a tag (!!omap)"),
    ("run_dir: !!python/object/apply:os.system [true]", "a tag (!!python/object/apply:os.system)"),
    ("run_dir: ! x", "a tag (!)"),
    ("run_dir: !<tag:\x1b[31m> x", "valid YAML"),
    ("run_dir: !!%1b%5b31m x", r"a tag (!!\x1b[31m)"),
    ("!!str n_layers: 2", "a tag (!!str)"),
    ("n_layers: &a 2", None),
    ("n_layers: &a 2\nn_heads: *a", "an alias"),
    ("n_layers: *a", "an alias"),
    ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "an alias"),
    ("<<: {n_layers: 2}", "'<<'"),
    ("? n_layers\n: 2", None),
    ("? [n_layers]\n: 2", "a key must be a plain name"),
    ("? {a: b}\n: 2", "a key must be a plain name"),
    # keys
    ("n_layers: 2\nn_layers: 2", "also on line 1"),
    ('n_layers: 2\n"n_layers": 3', "also on line 1"),
    ("'': 2", "got ''"),
    ("~: 2", "a known flag name"),
    ("1.5: 2", "got 1.5"),
    (".nan: 2", "got nan"),
    ("n_layers : 2", None),
    ("ｎ_layers: 2", "a known flag name"),
    ('"n_layers\\0": 2', r"'n_layers\x00'"),
    ('"\\e[2Jn_layers": 2', r"\x1b[2Jn_layers"),
    ('"n_\\u202elayers": 2', r"n_\u202elayers"),
    ('"\\ud800": 2', r"'\ud800'"),
    (f"{'k' * 1000}: 2", "characters"),
    (f"? {'k' * 500_000}\n: 2", "500,000 characters"),
    ("--n_layers: 2", "'--n_layers'"),
    ("n-layers: 2", "did you mean 'n_layers'"),
    ("config: {tmp}/text.txt", "'config'"),
    # numbers
    (f"max_steps: {DIGITS}", "a number ≥ 1"),
    (f"max_steps: -{DIGITS[1:]}", "a number ≥ 1"),
    (f"max_steps: {'1' * 401}", "too long"),
    (f"learning_rate: {DIGITS}", "infinite"),
    (f"learning_rate: 0.{'0' * 500}1", "too long"),
    ("learning_rate: 1e-999", "is 0"),
    ("weight_decay: 1e-999", "is 0"),
    ("weight_decay: 1e-50", "is 0"),
    ("weight_decay: -1e-999", "≥ 0"),
    ("epsilon: 1e-300", "is 0"),
    ("epsilon: 1e-39", "is 0"),
    ("epsilon: 1.2e-38", None),
    ("learning_rate: 1e39", "infinite"),
    ("learning_rate: 1e30\nlr_multiplier: 1e30", "product with lr_multiplier"),
    ("learning_rate: 1e-20\nlr_multiplier: 1e-20", "product with lr_multiplier"),
    ("num_epochs: 1e308", "≤"),
    ("num_epochs: 1e-320", "is 0"),
    ("beta1: 0.99999999999", "in float32 this one is 1"),
    ("beta2: 0.999999999999999", "in float32 this one is 1"),
    ("dropout: 0.99999999999", "in float32 this one is 1"),
    ("min_lr_ratio: 1.00000000001", "≤ 1"),
    ("learning_rate: ١٢", "'١٢'"),
    ("max_steps: 1_000", "'1_000'"),
    ("max_steps: 0x10", "'0x10'"),
    ("max_steps: 0o17", "'0o17'"),
    ("max_steps: 0b11", "'0b11'"),
    ("max_steps: +7\nwarmup_steps: 0", None),
    ("max_steps: 1e400", "got inf"),
    ("max_steps: 12:30:45", "'12:30:45'"),
    ("learning_rate: -.inf", "finite"),
    ("learning_rate: .NaN", "finite"),
    ("learning_rate: 1e", "'1e'"),
    ("learning_rate: 1,5", "'1,5'"),
    ("seed: -0", None),
    ("seed: 2147483648", "≤"),
    ("n_layer_divisor: 5e-324", "is 0"),
    ("batch_size_multiplier: 1e308", "infinite"),
    ("batch_size_multiplier: 1e30", "at most 2147483647"),
    ("lora_alpha_multiplier: 1e38", "a product from"),
    (
        "n_layers: 2147483647\nd_model: 2147483647\nn_heads: 1\nd_ff: 1\nbatch_size: 1",
        "a product of at most",
    ),
    ("d_model: 1000000000\nn_heads: 1", "a width whose d_ff is at most"),
    ("batch_size: 2147483647", "tokens"),
    ("seq_len: 2147483647\nbatch_size: 1", "tokens"),
    ("vocab_multiple: 2147483647\nd_model: 2147483646\nn_heads: 1\nd_ff: 1\nn_layers: 0", "product"),
    # values of the wrong kind
    ("n_layers: [2]", "got [2]"),
    ("n_layers: {a: 1}", "got {'a': 1}"),
    ("n_layers: " + "[" * 300 + "]" * 300, "got [[[[...]]]]"),
    ("n_layers: " + "[" * 100_000, "nested too deep"),
    ("n_layers: " + "{a: " * 100_000, "nested too deep"),
    ("- " * 100_000, "nested too deep"),
    ("n_layers: [" + "1, " * 60_000 + "]", "at most 30,000"),
    ("".join(f"k{n}: 1\n" for n in range(30_000)), "at most 30,000"),
    (f"run_dir: '{'x' * 990_000}'", "name too long"),
    (f"# {'x' * 1_000_000}", "at most 1,000,000 bytes"),
    ("mesh: '" + "data=2," * 50_000 + "'", "each axis once"),
    ("mesh: ²=2", "axes among"),
    ("mesh: data=٢", "whole number"),
    ("scheduler: ''", "got ''"),
    ("scheduler: COSINE", "one of cosine"),
    ('optimizer: "adamw\\n"', r"'adamw\n'"),
    ("wandb_project: \"\\e]0;title\\a\"", None),
    # encodings
    ("\ufeffn_layers: 2", None),
    ("n_layers: 2\r\nn_heads: 6\r\n", None),
    ("n_layers: 2\rn_heads: 6\r", None),
    ("n_layers: 2\u2028n_heads: 6", None),
    ("n_layers: 2".encode("utf-16"), "UTF-8"),
    ("n_layers: 2".encode("utf-32"), "UTF-8"),
    (b"run_dir: caf\xe9", "UTF-8"),
    (b"run_dir: \xed\xa0\x80", "UTF-8"),
    (b"\x00" * 1000, "valid YAML"),
    (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "UTF-8"),
    (b"\x1f\x8b\x08\x00binary", "UTF-8"),
    (b"n_layers: \x1b[31m2", "valid YAML"),
    (b"n_layers: 2\x07", "valid YAML"),
    ("n_layers: 2\u200b", "whole number"),
    ('run_dir: "\\U00110000"', "valid YAML"),
    ('run_dir: "\\UFFFFFFFF"', "valid YAML"),
    ('run_dir: "\\xZZ"', "line 1"),
    ("run_dir: 'unfinished", "valid YAML"),
    ("\tn_layers: 2", "line 1"),
    # paths
    ('run_dir: "a\\0b"', "null byte"),
    ('run_dir: "\\ud800"', r"\ud800"),
    ('data: "a\\0b"', "null byte"),
    ('data: "\\ud800"', r"\ud800"),
    ("run_dir: ''", "not empty"),
    ("run_dir: ~nosuchuser/x", "home directory"),
    ("data: ~nosuchuser", "home directory"),
    ('data: "\\e[2J\\r"', r"\x1b[2J\r"),
    (f"data: {'y' * 300}", "name too long"),
    (f"run_dir: {'a/' * 3000}", "name too long"),
    (f"run_dir: {{tmp}}/new/{'z' * 256}", "name too long"),
    ("run_dir: {tmp}/text.txt", "a folder, or a path not yet in use"),
    ("run_dir: {tmp}/text.txt/below", "is not a folder"),
    ("run_dir: {tmp}/pipe", "a folder, or a path not yet in use"),
    ("run_dir: {tmp}/loop", "symbolic links"),
    ("run_dir: {tmp}/read_only/new", None if os.geteuid() == 0 else "may not be written"),
    ("data: {tmp}/pipe", "an existing file or folder"),
    ("data: {tmp}/socket", "an existing file or folder"),
    ("data: /dev/zero", "an existing file or folder"),
    ("tokenizer: /dev/zero", "an existing tokenizer.json"),
    ("tokenizer: {tmp}/pipe", "an existing tokenizer.json"),
    ("scaling_schedule_file: {tmp}/pipe", "an existing file"),
    ("scaling_schedule_file: {tmp}", "an existing file"),
    ("cache_dir: \"\\0\"", "null byte"),
]  # fmt: skip


def schedule(*entries: Any) -> str:
    """A schedule of these entries, as JSON."""
    return json.dumps(list(entries))


SCHEDULES: Sequence[tuple[str, Content, str | None]] = [
    ("a.json", schedule(), None),
    ("a.json", schedule(ENTRY), None),
    ("a.json", "\ufeff" + schedule(ENTRY), None),
    ("a.yaml", "\ufeff" + schedule(ENTRY), None),
    ("a.json", schedule(*[ENTRY] * 1001), "at most 1,000 entries"),
    ("a.json", schedule(*[ENTRY] * 20_000), "at most 1,000,000 bytes"),
    ("a.json", "[" + "1," * 400_000 + "1]", "at most 1,000 entries"),
    ("a.yaml", "- 1\n" * 200_000, "at most 30,000"),
    ("a.json", schedule(nested(900)), "got [[[[...]]]]"),
    ("a.json", json.dumps(nested(5)), "entry 1"),
    ("a.json", "[" * 500_000, "nested too deep"),
    ("a.json", '{"a":' * 100_000, "nested too deep"),
    ("a.json", schedule(dict(ENTRY) | {"value": nested(500)}), "entry 1 (change_lr): value"),
    ("a.json", schedule(dict(ENTRY) | {"value": 10**399}), "entry 1 (change_lr): value"),
    ("a.json", schedule(ENTRY).replace("0.5", DIGITS), "entry 1 (change_lr): value"),
    ("a.json", schedule(ENTRY).replace("0.5", "9" * 10_000), "entry 1 (change_lr): value"),
    ("a.json", schedule(ENTRY).replace("0.5", "1e-999"), "is 0"),
    ("a.json", schedule(ENTRY).replace("0.5", "1e-50"), "is 0"),
    ("a.json", schedule(ENTRY).replace("0.5", "-0.0"), "> 0"),
    ("a.json", schedule(ENTRY).replace("0.5", "1_0"), "valid JSON"),
    ("a.json", schedule(ENTRY).replace("0.5", "١"), "valid JSON"),
    ("a.json", schedule(ENTRY).replace("0.5", "-Infinity"), "finite"),
    ("a.json", schedule(dict(ENTRY) | {"desc": "\x1b[31mred\r"}), None),
    ("a.json", schedule(dict(ENTRY) | {"desc": "\ud800"}), "valid Unicode"),
    ("a.json", schedule(dict(ENTRY) | {"desc": "x" * 900_000}), None),
    ("a.json", schedule(dict(ENTRY) | {"name": "\x1b[31m"}), r"\x1b[31m"),
    ("a.json", schedule(dict(ENTRY) | {"name": "\u202e"}), r"\u202e"),
    ("a.json", schedule(dict(ENTRY) | {"name": "x" * 900_000}), "900,000 characters"),
    ("a.json", schedule(dict(ENTRY) | {"x" * 900_000: 1}), "900,000 characters"),
    ("a.json", schedule(dict(ENTRY) | {"\x00": 1}), r"'\x00'"),
    ("a.json", schedule(dict(ENTRY) | {"options": {"\x1b": 1}}), r"\x1b"),
    ("a.json", schedule(dict(ENTRY) | {"completed": {}}), "true or false"),
    ("a.json", schedule(dict(ENTRY) | {"max_wait_iters": 2**63}), "≤"),
    ("a.json", schedule(dict(ENTRY) | {"trigger_loss": 1e-320}), "is 0"),
    ("a.json", schedule(dict(ENTRY) | {"name": "widen_mlp", "value": 1e6}), None),
    ("a.json", schedule(*[dict(ENTRY) | {"name": "widen_mlp", "value": 1e6}] * 2), "entry 2"),
    (
        "a.json",
        schedule(*[dict(ENTRY) | {"name": n, "value": 1e6} for n in ("widen_mlp", "stack_layers")]),
        "entry 2 (stack_layers): value",
    ),
    ("a.json", schedule(*[dict(ENTRY) | {"value": 1e-6}] * 9), "a product from"),
    ("a.json", '[{"name": "\x1b[31m"}]', "valid JSON"),
    ("a.json", '[{"a": 1, "a": 2, "\\u001b": 3}]', "each field once"),
    ("a.json", b"[\xff\xfe]", "UTF-8"),
    ("a.yaml", "- !!map {name: change_lr}", "a tag (!!map)"),
    ("a.yaml", "- {name: change_lr, value: !!float 1, reevaluate: false}", "a tag (!!float)"),
    ("a.yaml", "- &a {name: change_lr}\n- *a", "an alias"),
    ("a.yaml", '- {name: "\\e[31m", value: 1, reevaluate: false}', r"\x1b[31m"),
    ("a.yaml", "name: change_lr", "a list of entries"),
    ("a.yaml", "--- []\n--- []", "another document"),
    ("a.txt", schedule(ENTRY), "*.json"),
    ("a.JSON", schedule(ENTRY), "*.json"),
    ("\x1b[31m.json", "{", r"\x1b[31m.json"),
    ("\u202efdp.json", "{", r"\u202efdp.json"),
]  # fmt: skip

CURVES: Sequence[tuple[Content, str | None]] = [
    ("step,loss\n0,3\n", None),
    ("\ufeffstep,loss\r\n0,3\r\n", None),
    ("", "the header step,loss"),
    ("step,loss\n", "a row for each evaluation"),
    ("step,loss\n0,١\n", "a number"),
    ("step,loss\n١,1\n", "a whole number"),
    ("step,loss\n1_0,1\n", "a whole number"),
    ("step,loss\n0,1e999\n", None),
    (f"step,loss\n{'1' * 400},1\n", "a whole number"),
    ("step,loss\n0,\x1b[31m\n", r"\x1b[31m"),
    ('step,loss\n0,"\n', "valid CSV"),
    (f'step,loss\n0,"{"x" * 200_000}"\n', "line 2"),
    (b"step,loss\n0,\x00\n", "line 2"),
    ("step,loss\n" + "0,1,2\n", "two columns"),
    (b"step,loss\n0,\xff\n", "UTF-8"),
    (b"x" * 16_000_001, "at most 16,000,000 bytes"),
]

FLAGS: Sequence[tuple[Sequence[str], str | None]] = [
    (["--max_steps", DIGITS], "a number ≥ 1"),
    (["--max_steps", "9" * 100_000], "at most 400 characters"),
    (["--max_steps", "١٢"], "the digits 0 to 9"),
    (["--max_steps", "1_000"], "the digits 0 to 9"),
    (["--max_steps", " 12 "], "the digits 0 to 9"),
    (["--max_steps", "𝟙𝟚"], "the digits 0 to 9"),
    (["--max_steps", "²"], "a whole number"),
    (["--max_steps", ""], "a whole number"),
    (["--max_steps", "None"], None),
    (["--learning_rate", "1_0e-3"], "the digits 0 to 9"),
    (["--learning_rate", DIGITS], "infinite"),
    (["--learning_rate", "1e-999"], "is 0"),
    (["--learning_rate", "0x1p-3"], "a number"),
    (["--learning_rate", "infinity"], "a number"),
    (["--learning_rate", "nan"], "finite"),
    (["--num_epochs", "1e308"], "≤"),
    (["--epsilon", "1e-300"], "is 0"),
    (["--weight_decay", "1e-46"], "is 0"),
    (["--beta1", "0.9999999999"], "in float32 this one is 1"),
    (["--\x1b[31m", "1"], r"--\x1b[31m"),
    (["--" + "x" * 100_000], "100,002 characters"),
    (["\x1b[2J"], r"\x1b[2J"),
    (["x" * 1_000_000], "1,000,000 characters"),
    (["--scheduler", "\x1b[31m"], r"\x1b[31m"),
    (["--mesh", "\r\n\x1b"], "axes among"),
    (["--run_dir", "~nosuchuser/x"], "home directory"),
    (["--run_dir", ""], "not empty"),
    (["--data", ""], "not empty"),
    (["--run_dir", "a\0b"], "null byte"),
    (["--run_dir", "x" * 300], "name too long"),
    (["--run_dir", "\ud800"], r"\ud800"),
    (["--run_dir", "{tmp}/\x1b[31m"], None),
    (["--run_dir", "{tmp}/\udcff"], None),
    (["--run_dir", "/proc/nothing/x"], None if os.geteuid() == 0 else "may not be written"),
    (["--run_dir", "/dev/null/x"], "is not a folder"),
    (["--config", "a\0b"], "null byte"),
    (["--config", "\ud800"], r"\ud800"),
    (
        ["--config", "x" * 5000],
        "expected a file, or one of the package's own: all_operations, demo",
    ),
    (["--config", "{tmp}"], "it is a folder"),
    (["--config", "{tmp}/pipe"], "it is a pipe"),
    (["--config", "{tmp}/socket"], "it is a socket"),
    (["--config", "{tmp}/loop"], "symbolic links"),
    (["--config", "/dev/zero"], "it is a device"),
    (["--config", "/dev/null"], "it is a device"),
    (["--config", "/dev/full"], "it is a device"),
    (["--config", ""], "a readable file"),
    (["--scaling_schedule_file", "{tmp}/pipe"], "an existing file"),
    (["--scaling_schedule_file", "/dev/zero"], "an existing file"),
    (["--simulate_loss", "{tmp}/pipe"], "an existing file"),
    (["--data", "{tmp}/loop"], "symbolic links"),
    (["--tokenizer", "x" * 5000], "name too long"),
]


def make_places(folder: Path) -> None:
    """Make what paths of the rows lead to: a file, a pipe, a socket, a loop, a read-only folder."""
    (folder / "text.txt").write_text("text")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "read_only").mkdir(mode=0o555)
    here = os.open(".", os.O_RDONLY)
    os.chdir(folder)  # the path of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("socket")
    finally:
        os.fchdir(here)
        os.close(here)


def rows(folder: Path) -> list[tuple[list[str], str | None, Path | None]]:
    """The rows as (arguments of `jaxmorph.train`, what is to be said, the file with the content)."""
    found: list[tuple[list[str], str | None, Path | None]] = []
    for number, (content, said) in enumerate(CONFIGS):
        path = _written(folder / f"config{number}", "settings.yaml", content, folder)
        found.append((["--config", str(path)], said, path))
    for number, (name, content, said) in enumerate(SCHEDULES):
        path = _written(folder / f"schedule{number}", name, content, folder)
        found.append((["--scaling_schedule_file", str(path)], said, path))
    plain = _written(folder / "plain", "schedule.json", schedule(ENTRY), folder)
    for number, (content, said) in enumerate(CURVES):
        path = _written(folder / f"curve{number}", "curve.csv", content, folder)
        argv = ["--scaling_schedule_file", str(plain), "--simulate_loss", str(path)]
        found.append((argv, said, path))
    for words, said in FLAGS:
        found.append(([word.replace("{tmp}", str(folder)) for word in words], said, None))
    return found


def _written(folder: Path, name: str, content: Content, places: Path) -> Path:
    folder.mkdir()
    path = folder / name
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    path.write_bytes(data.replace(b"{tmp}", os.fsencode(places)))
    return path
