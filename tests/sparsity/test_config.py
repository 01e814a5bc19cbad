import dataclasses

import pytest

from mlkit.errors import InvalidValueError
from mlkit.sparsity import LTEConfig
from tests.helpers.runs import run_python


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("expert_size", 0, "expert_size must be at least 1, got 0"),
        ("expert_size", 32.0, "expert_size must be an integer"),
        ("threshold", 0, r"threshold must be in \(0, 1\), got 0"),
        ("threshold", 1, r"threshold must be in \(0, 1\), got 1"),
        ("threshold", "0.5", "threshold must be a number"),
        ("eta", -0.1, "eta must be at least 0, got -0.1"),
        ("eta", float("nan"), "eta must be a number"),
        ("lam", -1, "lam must be at least 0"),
        ("lam_schedule", (0.8, 0.3), "lam_schedule must be two fractions"),
        ("lam_schedule", 0.5, "lam_schedule must be two fractions"),
        ("sep_eps", 0, "sep_eps must be above 0"),
        ("target_sparsity", 80, r"target_sparsity must be in \(0, 1\), got 80.*0\.8 for 80 %"),
        ("router", "softmax", "router must be one of"),
        ("router_init", "zeros", "router_init must be one of"),
        ("router_scale", 0, "router_scale must be above 0"),
        ("router_bias", True, "router_bias must be a number"),
        ("top_p", 0, r"top_p must be in \(0, 1\]"),
        ("min_experts", -1, "min_experts must be at least 0"),
        ("grouping", "metis", "grouping must be one of"),
        ("assign", "best", "assign must be one of"),
        ("mode", "sparse", "mode must be one of"),
        ("layer_weighting", "x", "layer_weighting must be one of"),
        ("activation", "sillu", "did you mean 'silu'"),
        ("layers", (), "layers must be one or more integers"),
        ("layers", 3, r"layers must be one or more integers, as in .*got 3"),
        ("layers", "all", "layers must be one or more integers"),
        ("layers", (0, True), "layers must be one or more integers"),
        ("layers", (0, 1.0), "layers must be one or more integers"),
        ("pad_to_multiple", 32, "pad_to_multiple must be True or False, got 32; the multiple"),
        ("projections", ("a",), "projections must name the linear layers"),
        ("projections", "abc", "projections must name the linear layers"),
        ("projections", ("a", "a", "b"), "projections must differ"),
    ],
)
def test_bad_values_name_the_field(field, value, message):
    with pytest.raises(InvalidValueError, match=message):
        LTEConfig(**{field: value})


def test_lists_become_tuples_so_that_json_gives_an_equal_config():
    config = LTEConfig(projections=("a", "b", "c"), lam_schedule=(0.25, 0.5), layers=range(2))
    fields = {
        f.name: list(v) if isinstance(v := getattr(config, f.name), tuple) else v
        for f in dataclasses.fields(config)
    }
    assert LTEConfig(**fields) == config


def test_lambda_is_zero_then_ramps_then_stays():
    config = LTEConfig(lam=0.5, lam_schedule=(0.5, 0.3))
    values = [config.lambda_at(p) for p in (0, 0.49, 0.5, 0.65, 0.8, 1)]
    assert values == [0, 0, 0, 0.25, 0.5, 0.5]
    assert LTEConfig.paper_literal(eta=2.0).lambda_at(0) == 0.5
    assert LTEConfig(lam_schedule=(0.5, 0)).lambda_at(0.5) == 0.5


def test_config_needs_no_torch():
    done = run_python(
        "-c", "import sys; from mlkit.sparsity import LTEConfig; LTEConfig()\n"
        "assert 'torch' not in sys.modules"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_activations_are_those_of_the_kernel():
    from mlkit.sparsity.config import ACTIVATIONS
    from mlkit_kernels.sparse_mlp import ACTIVATIONS as FUNCTIONS

    assert set(ACTIVATIONS) == set(FUNCTIONS)
