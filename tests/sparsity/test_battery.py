"""LTE passes the battery of converters; a case for each way in which a layer is replaced."""

from dataclasses import replace

from mlkit.sparsity.config import LTEConfig
from tests.helpers.battery import ALL_PASS, BatteryCase, ConverterBattery
from tests.sparsity import tiny

OWN = LTEConfig(expert_size=8, projections=("w1", "w3", "w2"), activation="silu")
PADDED = LTEConfig(expert_size=20, pad_to_multiple=True)
PADDED_OWN = replace(OWN, expert_size=20, pad_to_multiple=True)


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
        # 32 or 48 neurons and 20 to an expert: 8 or 12 zero neurons
        BatteryCase("own-padded", tiny.own, tiny.vector_inputs, PADDED_OWN, ALL_PASS),
        BatteryCase(
            "phi3-padded", tiny.phi3, tiny.token_inputs, PADDED, ALL_PASS, call=tiny.logits
        ),
        BatteryCase(
            "gpt2-padded-last", tiny.gpt2, tiny.token_inputs, replace(PADDED, layers=(-1,)),
            ALL_PASS, call=tiny.logits,
        ),
        BatteryCase("opt-padded", tiny.opt, tiny.token_inputs, PADDED, ALL_PASS, call=tiny.logits),
    )  # fmt: skip
