"""FIITED passes the battery of converters; below density 1 it does not keep all of a table."""

from mlkit.embeddings import FIITEDConfig
from tests.embeddings.fiited import toy
from tests.helpers.battery import ALL_PASS, BatteryCase, ConverterBattery, raises

WHOLE = FIITEDConfig(target_density=1.0)
# With warm_start="magnitude" stock weights are taken, but what comes back has zeros in it.
BELOW = ALL_PASS | {
    "stock_checkpoint": raises(AssertionError, "user.weight"),
    "restore": raises(AssertionError, "user.weight"),
    "tied": raises(AssertionError, "Tensor-likes are not equal"),
}


class TestFIITED(ConverterBattery):
    # DDP below density 1, and fused; test_ddp.py has more.
    cases = (
        BatteryCase("bags", toy.bags, toy.ids, WHOLE, ALL_PASS, slow=("ddp",)),
        BatteryCase(
            "embedding", toy.words, toy.ids, FIITEDConfig(target_density=1.0, layout="chunk"),
            ALL_PASS, slow=("ddp",),
        ),
        BatteryCase(
            "budget", toy.bags, toy.ids,
            FIITEDConfig(
                memory_budget=0.4, num_chunks=2, utility_dtype="uint8", warm_start="magnitude"
            ),
            BELOW,
        ),
        # The rate is zero: outputs are compared before and after a backward pass.
        BatteryCase(
            "fused", toy.bags, toy.ids,
            FIITEDConfig(target_density=1.0, optimizer="rowwise_adagrad", lr=0.0), ALL_PASS,
        ),
    )  # fmt: skip
