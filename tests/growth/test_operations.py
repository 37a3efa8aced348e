"""The table of operations: what each takes, what it does to a run's shape, and how it is described."""

import dataclasses
import subprocess
import sys

import pytest
from schedule_entries import make_shape

from jaxmorph.config.closed_heads import NONE_CLOSED, ClosedHeads
from jaxmorph.config.run_shape import OperationError, RunShape, scaled_count, whole_product
from jaxmorph.growth.operations import OPERATIONS, describe_operations

DOCUMENTED = [
    "change_lr",
    "change_batch_size",
    "change_grad_accum",
    "reset_lr_schedule",
    "change_warmup_iters",
    "change_eval_iters",
    "change_eval_interval",
    "change_lora_alpha",
    "stack_layers",
    "widen_mlp",
    "decrease_attn_lora_scaling",
    "decrease_vocab_lora_scaling",
    "merge_lora_weights",
    "set_gates",
    "prune_heads",
    "regrow_heads",
    "remove_heads",
]
SET = [
    "lr",
    "batch_size",
    "grad_accum",
    "warmup_iters",
    "eval_iters",
    "eval_interval",
    "lora_alpha",
    "seq_len",
    "n_layers",
    "d_ff",
    "n_heads",
    "d_model",
    "attn_lora_rank",
    "vocab_lora_rank",
]


def difference(before: RunShape, after: RunShape) -> dict:
    """The fields that differ, the model's by their own names."""

    def flat(shape):
        fields = dataclasses.asdict(shape)
        return fields.pop("model") | fields

    old = flat(before)
    return {name: new for name, new in flat(after).items() if new != old[name]}


def test_the_table_has_every_operation():
    names = {*DOCUMENTED, *(f"set_{name}" for name in SET)}
    assert set(OPERATIONS) == names | {"widen_heads", "widen_embed", "change_seq_len"}
    assert all(name == operation.name for name, operation in OPERATIONS.items())


# 5 to 8 of 16 heads are closed.
HALF = {"fewest": 5, "most": 8, "controlled": False, "least_open": 1, "faint": False}

# operation, value, options, what changes
CHANGES = [
    ("change_lr", 0.5, {}, {"lr_multiplier": 1.0}),
    ("set_lr", 3e-3, {}, {"lr_multiplier": 3.0}),
    ("change_batch_size", 1.5, {}, {"batch_size": 15}),
    ("change_batch_size", 1.26, {}, {"batch_size": 12}),
    ("change_batch_size", 0.01, {}, {"batch_size": 1}),
    ("set_batch_size", 12, {}, {"batch_size": 12}),
    ("change_grad_accum", 2, {}, {"grad_accum_steps": 6}),
    ("change_grad_accum", 0.3, {}, {"grad_accum_steps": 1}),
    ("set_grad_accum", 5, {}, {"grad_accum_steps": 5}),
    ("reset_lr_schedule", None, {}, {}),
    ("change_warmup_iters", 1.1, {}, {"warmup_steps": 55}),
    ("set_warmup_iters", 0, {}, {"warmup_steps": 0}),
    ("change_eval_iters", 1.5, {}, {"eval_iters": 10}),
    ("set_eval_iters", 9, {}, {"eval_iters": 9}),
    ("change_eval_interval", 1.15, {}, {"eval_interval": 115}),
    ("set_eval_interval", 30, {}, {"eval_interval": 30}),
    ("change_lora_alpha", 0.5, {}, {"lora_alpha": 16.0}),
    ("set_lora_alpha", 8, {}, {"lora_alpha": 8}),
    ("stack_layers", 2, {}, {"n_layers": 8}),
    ("stack_layers", 1.25, {"order": "middle"}, {"n_layers": 5}),
    ("stack_layers", [0, 0, 1, 2, 3, 3], {}, {"n_layers": 6}),
    ("stack_layers", (3, 2, 1, 0, 0), {"moments": "fresh"}, {"n_layers": 5}),
    ("stack_layers", [0, 1, 0, 2, 3, 2], {"recipe": "identity"}, {"n_layers": 6}),
    ("set_n_layers", 6, {"order": "middle", "recipe": "identity"}, {"n_layers": 6}),
    ("set_n_layers", 4, {}, {}),
    ("set_d_ff", 97, {"recipe": "noise", "noise": 0.5}, {"d_ff": 97}),
    ("set_d_ff", 96, {}, {}),
    ("set_n_heads", 7, {"recipe": "even"}, {"n_heads": 7}),
    ("set_d_model", 192, {"recipe": "even"}, {"d_model": 192}),
    ("set_attn_lora_rank", 5, {"merge_first": True}, {"attn_lora_rank": 5}),
    ("set_vocab_lora_rank", 64, {"fresh_nu": 0.5}, {"vocab_lora_rank": 64}),
    ("widen_mlp", 1.5, {"recipe": "fresh"}, {"d_ff": 144}),
    ("widen_mlp", 97 / 96, {}, {"d_ff": 97}),
    ("widen_heads", 1.5, {}, {"n_heads": 6}),
    ("widen_embed", 3, {"recipe": "even"}, {"d_model": 192}),
    ("change_seq_len", 2, {}, {"seq_len": 96}),
    ("change_seq_len", 1 / 3, {}, {"seq_len": 16}),
    ("set_seq_len", 40, {}, {"seq_len": 40}),
    ("decrease_attn_lora_scaling", 2, {}, {"attn_lora_rank": 32}),
    ("decrease_attn_lora_scaling", 0.0625, {}, {"attn_lora_rank": 1}),
    ("decrease_vocab_lora_scaling", 0.5, {}, {"vocab_lora_rank": 4}),
    ("decrease_vocab_lora_scaling", 8, {}, {"vocab_lora_rank": 64}),
    ("merge_lora_weights", None, {}, {}),
    ("set_gates", 0.0, {"heads": [[0, 1], [3, 3]]}, {"closed": HALF | {"fewest": 5, "most": 10}}),
    ("prune_heads", 0.3, {}, {"closed": HALF | {"fewest": 8, "most": 10}}),
    ("regrow_heads", 0.5, {"by": "random"}, {"closed": HALF | {"fewest": 3, "most": 4}}),
    ("remove_heads", None, {}, {}),  # the largest case
]


@pytest.mark.parametrize(("name", "value", "options", "changed"), CHANGES)
def test_operation_changes_what_its_name_says_and_nothing_else(name, value, options, changed):
    heads = OPERATIONS[name].heads
    shape = make_shape(closed=ClosedHeads(**HALF) if heads else NONE_CLOSED)
    assert difference(shape, OPERATIONS[name].next_shape(shape, value, options)) == changed


def test_every_operation_is_in_the_tests():
    assert {name for name, *_ in CHANGES} == set(OPERATIONS)


# operation, value, options, the shape's changes, the words the error must hold
REFUSED = [
    ("change_lr", 0, {}, {}, ["value", "got 0", "> 0"]),
    ("change_lr", 1e6, {}, {"lr_multiplier": 1e25}, ["1e+30"]),
    ("change_batch_size", 1e6, {}, {"batch_size": 4000}, ["2147483647"]),
    ("reset_lr_schedule", 1.0, {}, {}, ["null"]),
    ("stack_layers", 1, {}, {}, ["(4 × 1 = 4)", "1.25 gives 5"]),
    ("stack_layers", 1.3, {}, {}, ["(4 × 1.3 = 5.2)", "1.25 gives 5", "1.5 gives 6"]),
    ("stack_layers", 2.5, {}, {"n_layers": 0}, ["2.5", "a whole number of layers"]),
    ("widen_mlp", 1.013, {}, {"d_ff": 64}, ["64 × 1.013 = 64.832", "1.015625 gives 65"]),
    ("widen_mlp", 1.0, {}, {}, ["> 1"]),
    ("widen_heads", 0.5, {}, {}, ["> 1"]),
    ("widen_embed", 1, {}, {}, ["≥ 2"]),
    ("widen_heads", 1.1, {}, {}, ["n_heads", "1.25 gives 5"]),
    ("widen_embed", 2.5, {}, {}, ["2.5", "whole multiple", "2 or 3"]),
    (
        "widen_embed",
        2,
        {"recipe": "fresh"},
        {},
        ["options: recipe", "'fresh'", "one of split, even"],
    ),
    ("widen_embed", 2, {"recipe": "even", "spread": 1}, {}, ["options: spread", "recipe split"]),
    ("stack_layers", [0, 1, 3, 3, 3], {}, {}, ["each of the 4 layers", "missing: [2]"]),
    ("stack_layers", [0, 1, 2, 3, 4], {}, {}, ["got 4", "one of the 4 layers", "0 to 3"]),
    ("stack_layers", [0, 1, 2, 3], {}, {}, ["[0, 1, 2, 3]", "more than the 4 layers"]),
    ("stack_layers", [0, 0], {"n": 1}, {"n_layers": 0}, ["options"]),
    ("stack_layers", [0, 0], {}, {"n_layers": 0}, ["as there are none to copy"]),
    ("stack_layers", [], {}, {}, ["a list of layers, such as [0, 0, 1, 1]"]),
    ("stack_layers", [0, -1], {}, {}, ["a list of layers"]),
    ("stack_layers", [0, True], {}, {}, ["a list of layers"]),
    ("stack_layers", [0, "1"], {}, {}, ["a list of layers"]),
    ("stack_layers", [0, 0, 1, 2, 3], {"order": "stack"}, {}, ["options: order", "list of layers"]),
    (
        "stack_layers",
        [3, 2, 1, 0, 0],
        {"recipe": "masked"},
        {},
        ["first in their order", "or recipe copy"],
    ),
    ("set_n_layers", 3, {}, {}, ["got 3", "at least the 4 that n_layers is", "--n_layer_divisor"]),
    ("set_n_layers", 2.0, {}, {}, ["whole number"]),
    ("set_d_ff", 95, {}, {}, ["at least the 96 that d_ff is", "--n_hidden_divisor"]),
    ("set_n_heads", 3, {}, {}, ["at least the 4 that n_heads is", "--n_heads"]),
    ("set_d_model", 32, {}, {}, ["at least the 64 that d_model is", "--d_model"]),
    ("set_d_model", 96, {}, {}, ["a multiple of the 64", "64 or 128"]),
    ("set_attn_lora_rank", 65, {}, {}, ["a rank of at most d_model (64)"]),
    ("set_attn_lora_rank", 0, {}, {}, ["≥ 1"]),
    ("set_vocab_lora_rank", 4, {}, {"vocab_lora_rank": 0}, ["vocab_lora_rank_divisor > 0"]),
    ("set_attn_lora_rank", 4, {"merge_first": 1}, {}, ["options: merge_first", "true or false"]),
    (
        "set_attn_lora_rank",
        4,
        {"merge_first": True, "fresh_nu": 1.0},
        {},
        ["options: fresh_nu", "merge_first false with it (it is true)"],
    ),
    ("change_seq_len", 1.01, {}, {}, ["48 × 1.01 = 48.48", "1.0208333333333333 gives 49"]),
    ("change_seq_len", 2, {}, {"positions": "learned"}, ["48 learned positions", "96", "rotary"]),
    ("set_seq_len", 0, {}, {}, ["whole number", "≥ 1"]),
    ("set_seq_len", 6.5, {}, {}, ["whole number"]),
    ("set_seq_len", 49, {}, {"positions": "learned"}, ["49", "48 learned positions"]),
    ("decrease_attn_lora_scaling", 1.05, {}, {}, ["16 × 1.05 = 16.8", "1.0625 gives 17"]),
    ("decrease_attn_lora_scaling", 8, {}, {}, ["from 1 to 64", "16 × 8 = 128", "4 gives 64"]),
    ("decrease_vocab_lora_scaling", 0.1, {}, {}, ["vocab_lora_rank", "from 1"]),
    ("decrease_attn_lora_scaling", 0.03, {}, {}, ["0.0625 gives 1"]),
    (
        "decrease_attn_lora_scaling",
        2,
        {},
        {"attn_lora_rank": 0},
        ["name", "attn_lora_rank_divisor"],
    ),
    ("decrease_vocab_lora_scaling", 2, {}, {"vocab_lora_rank": 0}, ["vocab_lora_rank_divisor"]),
    (
        "merge_lora_weights",
        None,
        {},
        {"attn_lora_rank": 0, "vocab_lora_rank": 0},
        ["attn_lora_rank_divisor or vocab_lora_rank_divisor"],
    ),
    ("stack_layers", 2, {"anneal_steps": 5}, {}, ["options: anneal_steps", "recipe masked"]),
    ("stack_layers", 2, {"recipe": "masked", "anneal_steps": 0}, {}, ["anneal_steps", "≥ 1"]),
    ("widen_mlp", 2, {"spread": 0.5, "recipe": "even"}, {}, ["recipe split with it (it is even)"]),
    ("widen_mlp", 2, {"recipes": "even"}, {}, ["options", "did you mean 'recipe'"]),
]


@pytest.mark.parametrize(("name", "value", "options", "changes", "words"), REFUSED)
def test_operation_refuses_what_it_cannot_do(name, value, options, changes, words):
    shape = make_shape(**changes)
    with pytest.raises(OperationError) as caught:
        OPERATIONS[name].next_shape(shape, value, options)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("size", [7, 48, 96, 12_345])
def test_factors_named_in_a_refusal_work(size):
    for factor in (0.377, 1.013, 2.71828):
        with pytest.raises(OperationError) as caught:
            OPERATIONS["change_seq_len"].next_shape(make_shape(seq_len=size), factor, {})
        for part in caught.value.expected.split("; ")[1].split(", "):
            works, _, gives = part.partition(" gives ")
            after = OPERATIONS["change_seq_len"].next_shape(
                make_shape(seq_len=size), float(works), {}
            )
            assert after.model.seq_len == int(gives)


@pytest.mark.parametrize(
    ("size", "factor", "product"),
    [
        (10, 1.1, 11),
        (100, 1.15, 115),
        (96, 0.3333333333333333, 32),
        (96, 0.3333333333, None),
        (64, 1.013, None),
        (49, 1 / 49, 1),
        (7, 3, 21),
        (0, 5.0, None),
    ],
)
def test_product_is_whole_as_it_was_written(size, factor, product):
    assert whole_product(size, factor) == product


def test_counts_are_rounded_down_but_not_below_a_decimal_as_written():
    assert [scaled_count(100, f) for f in (1.15, 1.1599, 0.29, 0.001)] == [115, 115, 29, 1]
    assert scaled_count(0, 3.0) == 1


def test_layers_can_come_from_none():
    shape = make_shape(n_layers=0)
    assert OPERATIONS["stack_layers"].next_shape(shape, 1.0, {}).model.n_layers == 1
    assert OPERATIONS["stack_layers"].next_shape(shape, 6, {}).model.n_layers == 6


@pytest.mark.parametrize(
    ("name", "value", "options", "exact"),
    [
        ("change_lr", 2.0, {}, True),
        ("change_lora_alpha", 2.0, {}, False),
        ("stack_layers", 2.0, {}, False),
        ("stack_layers", 2.0, {"recipe": "identity"}, True),
        ("stack_layers", 2.0, {"recipe": "masked"}, True),
        ("widen_mlp", 2.0, {}, True),
        ("widen_heads", 2.0, {"recipe": "noise"}, False),
        ("widen_embed", 2.0, {}, True),
        ("set_d_model", 128, {}, True),
        ("set_n_layers", 6, {}, False),
        ("set_n_layers", 4, {}, True),
        ("set_n_heads", 4, {"recipe": "noise"}, True),
        ("change_lora_alpha", 1.0, {}, True),
        ("set_attn_lora_rank", 8, {}, False),
        ("set_attn_lora_rank", 16, {}, True),
        ("set_vocab_lora_rank", 4, {"merge_first": True}, True),
        ("decrease_attn_lora_scaling", 2.0, {}, True),
        ("decrease_vocab_lora_scaling", 0.5, {}, False),
        ("merge_lora_weights", None, {}, True),
        ("set_gates", 1.0, {}, False),
        ("prune_heads", 0.5, {}, False),
    ],
)
def test_operation_says_whether_it_keeps_the_function(name, value, options, exact):
    operation, before = OPERATIONS[name], make_shape()
    after = operation.next_shape(before, value, options)
    assert operation.exact(before, after, operation.with_defaults(options)) is exact


# operation by a factor, factor, the same to a size, size, options of both
SAME = [
    ("stack_layers", 1.5, "set_n_layers", 6, {"order": "interleave", "recipe": "masked"}),
    ("widen_mlp", 1.5, "set_d_ff", 144, {"recipe": "fresh", "fresh_nu": 0.25}),
    ("widen_heads", 2, "set_n_heads", 8, {"recipe": "noise"}),
    ("widen_embed", 2, "set_d_model", 128, {"recipe": "even"}),
    ("decrease_attn_lora_scaling", 0.5, "set_attn_lora_rank", 8, {"merge_first": True}),
    ("decrease_vocab_lora_scaling", 0.5, "set_vocab_lora_rank", 4, {"fresh_nu": 0.0}),
]


@pytest.mark.parametrize(("by_factor", "factor", "to_size", "size", "options"), SAME)
def test_setting_a_size_does_what_the_factor_that_gives_it_does(
    by_factor, factor, to_size, size, options
):
    before, one, other = make_shape(), OPERATIONS[by_factor], OPERATIONS[to_size]
    after = one.next_shape(before, factor, options)
    assert other.next_shape(before, size, options) == after != before
    chosen = one.with_defaults(options)
    assert other.with_defaults(options) == chosen
    assert other.exact(before, after, chosen) == one.exact(before, after, chosen)
    assert (other.kind, other.recompiles, other.keeps) == (one.kind, one.recompiles, one.keeps)


def test_only_batch_size_and_changes_of_shape_recompile():
    before = make_shape(closed=ClosedHeads(**HALF))
    for name, value, options, _ in CHANGES:
        operation = OPERATIONS[name]
        after = operation.next_shape(before, value, options)
        needs = after.model != before.model or after.batch_size != before.batch_size
        assert operation.recompiles >= needs, name
    quiet = {name for name, operation in OPERATIONS.items() if not operation.recompiles}
    hyper = {name for name, o in OPERATIONS.items() if o.kind == "hyperparameter"}
    morphs = {"merge_lora_weights", "regrow_heads"}
    assert quiet == hyper - {"change_batch_size", "set_batch_size"} | morphs


def test_options_have_defaults_they_would_accept():
    for operation in OPERATIONS.values():
        value = None if operation.value.kind is None else 1 if operation.heads else 2
        for name, option in operation.options.items():
            if option.default is None:
                continue  # none given
            chosen = {name: option.default}
            operation.check(
                value, chosen | ({option.only[0]: option.only[1]} if option.only else {})
            )


def test_description_tells_of_every_operation_and_option():
    lines = describe_operations().splitlines()
    for operation in OPERATIONS.values():
        place = next(n for n, line in enumerate(lines) if line.split()[0] == operation.name)
        assert operation.kind in lines[place]
        assert str(operation.value) in lines[place]
        assert lines[place + 1].strip() == operation.effect
        listed = lines[place + 2 : place + 2 + len(operation.options)]
        for line, (name, option) in zip(listed, operation.options.items(), strict=True):
            assert line.strip().startswith(f"- {name}: ")
            assert all(word in line for word in (*option.choices, "default"))


def test_words_import_no_jax():
    code = (
        "import sys, jaxmorph.growth.schedule, jaxmorph.growth.dry_run;"
        "sys.exit(bool({'jax', 'matplotlib', 'orbax'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
