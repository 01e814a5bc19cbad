from .op import available_backends as available_backends
from .op import sparse_mlp as sparse_mlp
from .prices import break_even_fraction as break_even_fraction
from .prices import measure_prices as measure_prices
from .reference import ACTIVATIONS as ACTIVATIONS
from .reference import expert_mask as expert_mask
from .reference import sparse_mlp_reference as sparse_mlp_reference
