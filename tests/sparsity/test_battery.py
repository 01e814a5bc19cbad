"""LTE passes the battery of converters; a case for each way in which a layer is replaced."""

from mlkit.sparsity.config import LTEConfig
from tests.helpers.battery import ALL_PASS, BatteryCase, ConverterBattery
from tests.sparsity import tiny

OWN = LTEConfig(expert_size=8, projections=("w1", "w3", "w2"), activation="silu")


class TestLTE(ConverterBattery):
    cases = (
        BatteryCase("own", tiny.own, tiny.vector_inputs, OWN, ALL_PASS),
        BatteryCase(
            "gpt2", tiny.gpt2, tiny.token_inputs, LTEConfig(expert_size=8), ALL_PASS,
            call=tiny.logits,
        ),
        BatteryCase(
            "opt", tiny.opt, tiny.token_inputs, LTEConfig(expert_size=8), ALL_PASS,
            call=tiny.logits,
        ),
        BatteryCase(
            "bert", tiny.bert, tiny.token_inputs, LTEConfig(expert_size=8, router="topp"), ALL_PASS,
            targets="*.layer.0", call=tiny.logits,
        ),
    )  # fmt: skip
