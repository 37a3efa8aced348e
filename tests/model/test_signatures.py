"""Signatures: reading them, the coverage they must give, and the GPT's own table."""

import dataclasses

import numpy as np
import pytest

from jaxmorph.config.resolve import resolve
from jaxmorph.config.start import model_config
from jaxmorph.model.architecture import (
    flops_per_token,
    gpt_axis_sizes,
    gpt_signatures,
    lora_adapters,
    parameter_count,
)
from jaxmorph.model.signatures import (
    Arrow,
    Role,
    SignatureError,
    axis_sizes,
    check_coverage,
    parse_signature,
    parse_table,
)
from jaxmorph.model.trainable import frozen_parameters


@pytest.mark.parametrize(
    ("text", "stacked", "consumed", "arrow", "produced"),
    [
        ("vocab +> embed", (), ("vocab",), Arrow.RESIDUAL, ("embed",)),
        ("layer | *> embed", ("layer",), (), Arrow.GAIN, ("embed",)),
        (
            "layer | embed -> head head_dim",
            ("layer",),
            ("embed",),
            Arrow.PLAIN,
            ("head", "head_dim"),
        ),
        ("layer expert | mlp +> embed", ("layer", "expert"), ("mlp",), Arrow.RESIDUAL, ("embed",)),
        ("embed *>", (), ("embed",), Arrow.GAIN, ()),
        ("-> embed", (), (), Arrow.PLAIN, ("embed",)),
    ],
)
def test_signature_reads_and_writes(text, stacked, consumed, arrow, produced):
    signature = parse_signature(text)
    assert (signature.stacked, signature.consumed) == (stacked, consumed)
    assert (signature.arrow, signature.produced) == (arrow, produced)
    assert str(signature) == text


@pytest.mark.parametrize(
    "text",
    ["", "embed", "->", "a -> b -> c", "a +> b *> c", "a -> a", "| a -> b", "A -> b", "a=b ->"],
)
def test_unreadable_signature_is_refused(text):
    with pytest.raises(SignatureError, match="signature"):
        parse_signature(text)


def test_roles():
    signature = parse_signature("layer | head head_dim +> embed")
    roles = {axis: signature.role(axis) for axis in signature.axes}
    assert roles == {
        "layer": Role.STACKED,
        "head": Role.CONSUMED,
        "head_dim": Role.CONSUMED,
        "embed": Role.PRODUCED,
    }
    with pytest.raises(KeyError):
        signature.role("vocab")


def test_coverage_names_what_is_missing_and_what_is_too_much():
    table = parse_table({"a": "embed -> mlp", "b": "-> mlp"})
    check_coverage(table, {"a": (2, 3), "b": (3,)})
    with pytest.raises(SignatureError, match="without a signature: c, d"):
        check_coverage(table, {"a": (2, 3), "b": (3,), "d": (), "c": ()})
    with pytest.raises(SignatureError, match="without a parameter: b"):
        check_coverage(table, {"a": (2, 3)})
    with pytest.raises(SignatureError, match=r"'mlp' is 3 in a and 4 in b"):
        check_coverage(table, {"a": (2, 3), "b": (4,)})
    with pytest.raises(SignatureError, match=r"a: shape \(2,\)"):
        check_coverage(table, {"a": (2,), "b": (3,)})
    with pytest.raises(SignatureError, match="c: signature 'x'"):
        parse_table({"c": "x"})


def _config(**changes):
    settings, _ = resolve([])
    return dataclasses.replace(model_config(settings, 65), **changes)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_gpt_table_counts_the_parameters_by_hand(norm, activation, tied_head, biases, positions):
    config = _config(
        norm=norm, activation=activation, tied_head=tied_head, biases=biases, positions=positions
    )
    L, D, F, V, T = 6, 384, 1536, 65, 256
    mlp_inputs = 2 if activation == "swiglu" else 1
    norms = 2 if biases and norm == "layernorm" else 1
    per_layer = 4 * D * D + (mlp_inputs + 1) * D * F + 2 * norms * D
    per_layer += (4 * D + mlp_inputs * F + D) if biases else 0
    expected = L * per_layer + V * D * (1 if tied_head else 2) + norms * D
    expected += T * D if positions == "learned" else 0
    assert parameter_count(config) == expected
    sizes = gpt_axis_sizes(config)
    shapes = {path: s.shape(sizes) for path, s in gpt_signatures(config).items()}
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == expected
    found = axis_sizes(gpt_signatures(config), shapes)
    assert found == {axis: size for axis, size in sizes.items() if axis in found}


def test_flops_per_token_are_palm_s_formula():
    config = _config()
    matrices = 6 * (4 * 384 * 384 + 2 * 384 * 1536) + 65 * 384
    assert flops_per_token(config) == 6 * matrices + 12 * 6 * 6 * 64 * 256
    assert flops_per_token(dataclasses.replace(config, tied_head=False)) == flops_per_token(config)


def test_adapters_are_a_detour_between_the_axes_of_what_they_adapt():
    config = _config(attn_lora_rank=16, vocab_lora_rank=8)
    table, adapters = gpt_signatures(config), lora_adapters(config)
    assert len(adapters) == 5
    for base, (down, up) in adapters.items():
        assert table[down].stacked == table[up].stacked == table[base].stacked
        assert table[down].consumed == table[base].consumed
        assert table[down].produced == table[up].consumed
        assert (table[up].arrow, table[up].produced) == (table[base].arrow, table[base].produced)
    assert {path for path in table if "lora" in path} == {
        p for pair in adapters.values() for p in pair
    }
    L, D, V = 6, 384, 65
    added = L * 16 * 4 * (D + D) + 8 * (V + D)
    assert parameter_count(config) == parameter_count(_config()) + added
    assert gpt_signatures(_config()).keys() == table.keys() - {
        p for a in adapters.values() for p in a
    }


@pytest.mark.parametrize("lora_base", ["frozen", "trained"])
@pytest.mark.parametrize("tied_head", [True, False])
def test_adapters_cost_no_token_anything(lora_base, tied_head):
    rank = {"attn_lora_rank": 16, "vocab_lora_rank": 8, "lora_base": lora_base}
    plain = flops_per_token(_config(tied_head=tied_head))
    assert flops_per_token(_config(tied_head=tied_head, **rank)) == plain


def test_frozen_are_the_adapted_matrices():
    rank = {"attn_lora_rank": 16, "vocab_lora_rank": 8}
    assert frozen_parameters(_config(**rank, lora_base="trained")) == frozenset()
    names = ("query", "key", "value", "out")
    wanted = {"embed/tokens", *(f"blocks/attention/{name}" for name in names)}
    assert frozen_parameters(_config(**rank)) == wanted
    assert frozen_parameters(_config()) == frozenset()
