"""FIITED passes the battery of converters; at a density below 1 it keeps no dense weights."""

from mlkit.embeddings import FIITEDConfig
from mlkit.errors import InvalidValueError
from tests.embeddings.fiited import toy
from tests.helpers.battery import ALL_PASS, BatteryCase, ConverterBattery, raises

# Below density 1 training starts afresh: there are no dense weights to give back.
BELOW = ALL_PASS | {
    "stock_checkpoint": raises(InvalidValueError, "does not fit into table 'user' at density"),
    "restore": raises(AssertionError, "weight"),
    "tied": raises(AssertionError, "Tensor-likes are not equal"),
}
# The anchor's gradient is zeros, and a parameter that is no weight cannot be seen in an output.
WHOLE = FIITEDConfig(target_density=1.0)


class TestFIITED(ConverterBattery):
    cases = (
        BatteryCase("bags", toy.bags, toy.ids, WHOLE, ALL_PASS),
        BatteryCase("embedding", toy.words, toy.ids, WHOLE, ALL_PASS),
        BatteryCase(
            "budget", toy.bags, toy.ids,
            FIITEDConfig(memory_budget=0.7, num_chunks=2), BELOW,
        ),
        BatteryCase(
            "fused", toy.bags, toy.ids,
            FIITEDConfig(target_density=1.0, optimizer="rowwise_adagrad", lr=0.0), ALL_PASS,
        ),
        BatteryCase(
            "fused-chunk", toy.words, toy.ids,
            FIITEDConfig(target_density=1.0, optimizer="adam", lr=0.0, layout="chunk"), ALL_PASS,
        ),
    )  # fmt: skip
